"""Every experiment's minute-sized version runs to its end as a reader would start it, and writes where it is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
WRITES = [
    "admin",
    "bigbird",
    "bmi",
    "calibration",
    "deep_thin",
    "deep_training",
    "feedback",
    "long_memory",
    "performer",
    "rank_collapse",
    "trainability",
]


def run(name, *options):
    command = [sys.executable, "-m", f"experiments.{name}.run", "--quick", *options]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.parametrize("name", WRITES)
def test_the_quick_version_runs(name, tmp_path):
    before = {
        path: path.stat().st_mtime_ns for path in (HERE / "experiments" / name).rglob("*") if path.suffix != ".pyc"
    }
    assert run(name, "--out", str(tmp_path / "out"))
    results = list((tmp_path / "out").rglob("results.json"))
    assert results
    assert all(json.loads(path.read_text()) for path in results)
    after = {
        path: path.stat().st_mtime_ns for path in (HERE / "experiments" / name).rglob("*") if path.suffix != ".pyc"
    }
    assert after == before, "a quick run must leave the published results alone"


@pytest.mark.full
def test_the_quick_version_of_adopting_on_a_tiny_model(tmp_path):
    pytest.importorskip("peft", reason="pip install 'clearhead[hf]'")
    from tests.hf.tiny_lm import write_model, write_texts

    text = write_texts(tmp_path / "text", documents=20)
    model = write_model(tmp_path / "model", text)
    out = tmp_path / "out"
    page = run("adopt_pretrained", "--model", str(model), "--data", str(text), "--out", str(out))
    assert page.count("| softmax |") == 2
    results = json.loads((out / "results.json").read_text())
    own = {row["attention"]: row["bits_per_byte"] for row in results["zero_shot"]}
    assert own["softmax+selective"] == pytest.approx(own["softmax"], rel=1e-5)
    assert {one["status"] for one in results["recovery"]} == {"finished"}


@pytest.mark.full
def test_a_few_points_of_the_moment_formulas():
    assert "relu" in run("moment_formulas", "--case", "relu", "--case", "linear")
