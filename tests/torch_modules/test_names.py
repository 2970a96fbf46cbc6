"""A package called torch inside clearhead hides nothing, and costs nothing."""

from __future__ import annotations

import subprocess
import sys

import torch

import clearhead as ch
import clearhead.torch.masks


def test_torch_is_the_library() -> None:
    assert clearhead.torch.masks.torch is torch
    assert torch.__name__ == "torch"
    assert callable(ch.torch.patch)
    assert set(dir(ch.torch)) >= {"patch", "unpatch", "timm_attention"}


def test_names_cost_nothing() -> None:
    code = (
        "import sys, clearhead as ch; ch.torch, ch.hf; import clearhead.evaluation.tasks; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
