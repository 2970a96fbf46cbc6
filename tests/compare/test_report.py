"""The report on SYNTHETIC folders: every figure stands in results.json, and the page needs nothing from outside."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clearhead.compare.report import FORMATS, Figures, redraw
from clearhead.compare.results import collect, plain
from clearhead.errors import UserError
from tests.compare import synthetic
from tests.page import Page, strict

CASES: dict[str, dict[str, Any]] = {
    "plain": {"effects": {"laser": -0.05, "self_adjust": 0.05}},
    "diverged": {"failures": {("laser", 1): "diverged", **{("self_adjust", s): "diverged" for s in range(5)}}},
    "baseline diverged": {"failures": {("softmax", s): "diverged" for s in range(5)}},
    "all diverged": {
        "failures": {
            (a, s): "diverged" for a in ("softmax", "laser", "self_adjust", "softmax+selective") for s in range(5)
        }
    },
    "crashed": {"failures": {("laser", 0): "crashed"}},
    "unfinished": {"missing": tuple(("laser", s) for s in range(1, 5)), "with_probe": False},
    "nothing yet": {
        "missing": tuple((arm.name, s) for arm in synthetic.plan().arms for s in range(5)),
        "with_probe": False,
    },
    "no luck": {"noise": 0.0},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("synthetic")
    made = {name: synthetic.write_comparison(root / name, synthetic.plan(), **case) for name, case in CASES.items()}
    thorough = synthetic.plan(
        preset="thorough", seeds=9, arms=["<b> & co: model.output_gate=head"], attention=["softmax", "laser"]
    )
    made["thorough"] = synthetic.write_comparison(root / "thorough", thorough, failures={("<b> & co", 2): "diverged"})
    for folder in made.values():
        redraw(folder)
    return made


ALL = [*CASES, "thorough"]


@pytest.mark.parametrize("case", ALL)
def test_every_figure_of_the_page_is_the_one_in_results_json(folders, case):
    results = strict((folders[case] / "results.json").read_text())
    page = Page((folders[case] / "report.html").read_text())
    look = Figures(results)
    assert len(page.figures) > 40
    for path, form, shown in page.figures:
        assert shown == FORMATS[form](look.value(path)), path


@pytest.mark.parametrize("case", ALL)
def test_no_undefined_value_is_shown(folders, case):
    page = Page((folders[case] / "report.html").read_text())
    assert not re.search(r"\b(nan|NaN|None|undefined|inf|Infinity|null)\b", page.text.replace("=none", ""))
    embedded = re.search(
        r'<script type="application/json" id="results">(.*?)</script>', (folders[case] / "report.html").read_text()
    )
    assert embedded
    strict(embedded[1].replace("\\u003c", "<"))


@pytest.mark.parametrize("case", ALL)
def test_the_page_stands_alone(folders, case):
    text = (folders[case] / "report.html").read_text()
    page = Page(text)
    assert all(link.startswith("#") or link == "data:," for link in page.links), page.links
    assert all(link[1:] in page.ids for link in page.links if link.startswith("#"))
    assert "@import" not in text.split("<script", 1)[0]
    assert "url(" not in text.split("<script", 1)[0]
    assert text.count("plotly.js v") == 1


def test_what_the_plots_draw_is_what_results_json_holds(folders):
    for folder in folders.values():
        text = (folder / "report.html").read_text()
        embedded = re.search(r'<script type="application/json" id="results">(.*?)</script>', text)
        assert embedded
        results = strict((folder / "results.json").read_text())
        assert strict(embedded[1]) == {name: results[name] for name in ("arms", "tuning", "unit")}


def test_the_numbers_are_those_of_the_runs(folders):
    results = strict((folders["plain"] / "results.json").read_text())
    for arm in results["arms"]:
        values = []
        for seed in range(5):
            run = folders["plain"] / "runs" / arm["name"] / f"seed{seed}" / "result.json"
            values.append(json.loads(run.read_text())["summary"]["test_bits_per_byte"])
        assert arm["test"]["mean"] == pytest.approx(np.mean(values))
        assert arm["test"]["sd"] == pytest.approx(np.std(values, ddof=1))
    assert [arm["comparison"]["verdict"] for arm in results["arms"]] == [
        "baseline", "better", "worse", "no difference shown at this size",
    ]  # fmt: skip
    assert results["complete"] is True
    assert results["headline"].startswith("Better than softmax: laser; worse than softmax: self_adjust")


def test_documents_are_compared_largest_first(folders):
    results = strict((folders["plain"] / "results.json").read_text())
    assert [row["name"] for row in results["documents"]] == ["play 2", "play 1"]
    means = [arm["comparison"]["mean"] or 0.0 for arm in results["arms"]]
    assert results["documents"][0]["differences"] == pytest.approx(means)


def test_documents_count_once_each_in_the_interval_over_them(folders):
    results = strict((folders["plain"] / "results.json").read_text())
    for place, (arm, found) in enumerate(zip(results["arms"], results["over_documents"], strict=True)):
        differences = [row["differences"][place] for row in results["documents"]]
        assert found["documents"] == len(differences) == 2
        if arm["baseline"]:
            assert (found["mean"], found["interval"]) == (None, None)
        else:
            assert found["mean"] == pytest.approx(np.mean(differences))


def test_csv_has_one_line_for_each_run(folders):
    rows = list(csv.DictReader((folders["crashed"] / "results.csv").open()))
    assert [(row["arm"], int(row["seed"])) for row in rows] == [
        (arm.name, seed) for arm in synthetic.plan().arms for seed in range(5)
    ]
    crashed = [row for row in rows if row["status"] == "crashed"]
    assert [(row["arm"], row["seed"], row["test_bits_per_byte"]) for row in crashed] == [("laser", "0", "")]
    assert "SIGKILL" in crashed[0]["reason"]


def test_an_unfinished_comparison_says_what_is_missing(folders):
    results = strict((folders["unfinished"] / "results.json").read_text())
    page = Page((folders["unfinished"] / "report.html").read_text())
    assert results["complete"] is False
    assert results["missing"] == [f"laser, seed {seed}" for seed in range(1, 5)]
    assert "This comparison is unfinished" in page.text
    assert "laser, seed 4" in page.text
    assert all(arm["comparison"]["verdict"] != "better" for arm in results["arms"])


def test_diverged_runs_are_shown_with_their_reason(folders):
    page = Page((folders["diverged"] / "report.html").read_text())
    assert "laser, seed 1, diverged at step 40: loss or gradient not finite" in " ".join(page.text.split())
    assert "self_adjust diverged: none of its 5 runs finished" in page.text


def test_a_baseline_without_a_finished_run_is_said_first(folders):
    results = strict((folders["baseline diverged"] / "results.json").read_text())
    assert results["headline"].startswith("Nothing to compare with, no run of the baseline softmax finished")


def test_names_cannot_break_the_page(folders):
    text = (folders["thorough"] / "report.html").read_text()
    assert "<b> & co" not in text.split("<script")[0]
    assert "&lt;b&gt; &amp; co" in text


def test_the_learning_rate_is_chosen_on_validation_alone(folders):
    tuning = strict((folders["thorough"] / "results.json").read_text())["tuning"]
    for arm in tuning["arms"]:
        best = min(arm["rates"], key=lambda row: row["val"])
        assert arm["chosen"] == best["rate"] == tuning["rates"][2]
        assert arm["at_edge"] is False
    assert set(tuning["seeds"]).isdisjoint(range(9))


def test_a_rate_with_a_failed_run_is_not_chosen(tmp_path):
    made = synthetic.plan(preset="thorough", seeds=2, attention=["softmax", "laser"])
    folder = synthetic.write_comparison(tmp_path / "x", made)
    for seed in (1000, 1001):
        for rate in made.learning_rates[1:3]:
            run = folder / "tuning" / "softmax" / f"lr{rate:g}-seed{seed}" / "result.json"
            values = json.loads(run.read_text()) | {"status": "diverged"}
            run.write_text(json.dumps(values))
    arm = collect(folder)["tuning"]["arms"][0]
    assert [row["val"] is None for row in arm["rates"]] == [False, True, True, False, False]
    assert arm["chosen"] == made.learning_rates[3]


def test_reaching_the_baselines_best(folders):
    arms = {arm["name"]: arm for arm in collect(folders["plain"])["arms"]}
    assert arms["softmax"]["reach"]["share_of_baseline"] == pytest.approx(1.0)
    assert arms["laser"]["reach"]["share_of_baseline"] < 1.0
    assert arms["laser"]["reach"]["reached"] == 5
    assert arms["self_adjust"]["reach"]["tokens"] is None
    speed = arms["laser"]["speed"]
    expected = arms["laser"]["reach"]["tokens"] * speed["median_seconds"] / speed["tokens_per_step"]
    assert arms["laser"]["reach"]["seconds"] == pytest.approx(expected)


def test_redraw_of_something_else_is_a_clear_error(tmp_path):
    with pytest.raises(UserError, match=r"no comparison there \(plan.json is missing\)"):
        redraw(tmp_path)
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match="not a readable plan"):
        redraw(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json"]


def test_redraw_repeats_itself(folders):
    before = (folders["plain"] / "report.html").read_bytes()
    redraw(folders["plain"])
    assert (folders["plain"] / "report.html").read_bytes() == before


def test_plain_values_are_strict_json():
    value = plain(
        {"a": np.float32(1.5), 2: (np.int64(3), np.nan, np.inf), "b": np.array([1.0, -np.inf]), "c": Path("x/y")}
    )
    assert value == {"a": 1.5, "2": [3, None, None], "b": [1.0, None], "c": "x/y"}
    json.dumps(value, allow_nan=False)


def test_a_folder_whose_probe_did_not_judge_the_load_is_drawn(tmp_path):
    folder = synthetic.write_comparison(tmp_path / "older", synthetic.plan())
    measured = json.loads((folder / "probe.json").read_text())
    assert measured.pop("busy") in (True, False)
    (folder / "probe.json").write_text(json.dumps(measured))
    redraw(folder)
    assert "busy with other things" not in (folder / "report.html").read_text()
