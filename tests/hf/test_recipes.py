"""The recipes run, on a random model, and say the same loss again after loading."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

import clearhead as ch

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["hf_temperature_only", "hf_lora_and_temperature", "hf_full"])
def test_recipe(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if "lora" in name:
        pytest.importorskip("peft")
    few = ["--steps", "3", "--length", "32", "--batch", "2", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [name, *few])
    importlib.import_module(f"recipes.{name}").main()
    said = capsys.readouterr().out
    trained = re.search(r"held-out loss (\S+) trained", said)
    assert trained is not None, said
    again = re.findall(r"(\d\.\d{4}) (?:loaded|opened|merged)", said)
    assert again == [trained[1]] * (2 if "lora" in name else 1)
    assert ch.hf.load(tmp_path / "merged" if "lora" in name else tmp_path) is not None
