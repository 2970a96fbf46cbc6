"""Every experiment's minute-sized version runs to its end as a reader would start it, and writes where it is told.

`make test` runs one of them, another with each commit; `make test-full` runs all.
"""

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
    "laser",
    "long_memory",
    "performer",
    "positions",
    "rank_collapse",
    "selective",
    "self_adjust",
    "trainability",
]


def run(name, *options):
    command = [sys.executable, "-m", f"experiments.{name}.run", "--quick", *options]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def in_turn():
    """The experiment whose turn it is: told by the commit, so that a failure comes again with the same commit."""
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True, check=False)
    return WRITES[int(asked.stdout[:8] or "0", 16) % len(WRITES)]


@pytest.mark.parametrize("name", [in_turn()])
def test_the_quick_version_whose_turn_it_is(name, tmp_path):
    check_quick(name, tmp_path)


@pytest.mark.full
@pytest.mark.parametrize("name", WRITES)
def test_the_quick_version_runs(name, tmp_path):
    check_quick(name, tmp_path)


def check_quick(name, tmp_path):
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
