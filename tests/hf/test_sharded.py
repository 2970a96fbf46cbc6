"""FSDP2 shards the temperatures with their layer, and what is gathered again can be loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import clearhead as ch
from tests.hf.patched import ids

pytest.importorskip("transformers")


@pytest.mark.full
def test_two_processes_equal_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, "-m", "tests.hf.shard_runner", str(tmp_path)],
        capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.stdout.split() == ["same", "same"], done.stderr[-3000:]
    with torch.no_grad():
        got = ch.hf.load(tmp_path)(ids(4, 8)).logits
    torch.testing.assert_close(got, torch.load(tmp_path / "want.pt", weights_only=True), rtol=1e-4, atol=1e-5)
