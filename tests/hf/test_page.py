"""The page about temperatures on pretrained models: its code runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from clearhead.hf.temperatures import temperature_parameters
from tests.hf.patched import build, ids

PAGE = Path(__file__).parents[2] / "docs" / "selective-pretrained.md"


def test_its_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    build("llama").save_pretrained("my-model")
    held: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks[:-1]:
        exec(compile(block, str(PAGE), "exec"), held)
    assert "2 layers of attention patched" in capsys.readouterr().out
    assert held["count"] == sum(p.numel() for p in held["own"].values()) == 100
    with torch.no_grad():
        assert torch.equal(held["again"](ids(1, 7)).logits, held["merged"].eval()(ids(1, 7)).logits)
    exec(compile(blocks[-1], str(PAGE), "exec"), held)
    assert len(temperature_parameters(held["again"])) == 4
