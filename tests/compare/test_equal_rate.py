"""A verdict between arms of different learning rates must hold at one rate too."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clearhead.compare import equal_rate, run
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.results import collect
from clearhead.compare.run import compare
from clearhead.compare.verdict import Comparison, Outcomes, Rates, Status, Verdict, compare_outcomes
from tests.compare import synthetic, test_run
from tests.compare.test_verdict import BASE, SEEDS, outcomes, shifted

text, in_process, _own_cache = test_run.text, test_run.in_process, test_run._own_cache  # fixtures
MISSING = dict.fromkeys(SEEDS, Status.MISSING)
DIVERGED = dict.fromkeys(SEEDS, Status.DIVERGED)


def judge(by: float, *, baseline_at_own: Outcomes, arm_at_baselines: Outcomes) -> Comparison:
    """An arm `by` away from the baseline at the rates that each chose."""
    rates = {"arm": Rates(2e-3, 1e-3, baseline_at_own, arm_at_baselines)}
    return compare_outcomes(outcomes("softmax", BASE), [outcomes("arm", shifted(by))], rates=rates)[0]


def again(name: str, by: float | None, failed: dict[int, Status] | None = None) -> Outcomes:
    return outcomes(
        name, None if by is None else list(np.array(shifted(by)) + np.roll([0.001, 0, 0, -0.001, 0], 1)), failed
    )


@pytest.mark.parametrize(("by", "verdict"), [(-0.05, Verdict.BETTER), (0.05, Verdict.WORSE)])
def test_a_difference_that_the_rate_explains_is_none(by, verdict):
    """With the other arm at the same rate as good, only the rates differ; with it where it was, the arms do."""
    explained = judge(by, baseline_at_own=again("softmax", by), arm_at_baselines=again("arm", 0.0))
    assert explained.verdict is Verdict.NO_DIFFERENCE
    assert "but that of their learning rates" in explained.sentence
    assert not explained.equal_rate.holds
    held = judge(by, baseline_at_own=again("softmax", 0.0), arm_at_baselines=again("arm", by))
    assert held.verdict is verdict
    assert held.equal_rate.holds
    better = verdict is Verdict.BETTER
    assert (held.equal_rate.anew, held.equal_rate.rate) == (("softmax", 2e-3) if better else ("arm", 1e-3))
    assert f"It holds with both at the learning rate {held.equal_rate.rate:g}" in held.sentence


def test_a_reversal_at_one_rate_is_no_verdict_either_way():
    found = judge(-0.05, baseline_at_own=again("softmax", -0.2), arm_at_baselines=again("arm", 0.2))
    assert found.verdict is Verdict.NO_DIFFERENCE
    assert found.equal_rate.interval.low > 0


def test_missing_runs_are_waited_for_and_failed_ones_speak():
    waiting = judge(
        -0.05, baseline_at_own=again("softmax", None, MISSING), arm_at_baselines=again("arm", None, MISSING)
    )
    assert waiting.verdict is Verdict.NOT_JUDGED
    assert "not judged yet" in waiting.sentence
    assert "the 5 runs of softmax at 0.002" in waiting.sentence
    unfit = judge(-0.05, baseline_at_own=again("softmax", None, DIVERGED), arm_at_baselines=again("arm", 0.0))
    assert unfit.verdict is Verdict.BETTER
    assert "softmax did not finish at 0.002" in unfit.sentence
    for found in (waiting, unfit):
        assert "None" not in found.sentence
        assert "nan" not in found.sentence


def test_no_difference_asks_for_no_further_run():
    found = judge(0.0, baseline_at_own=again("softmax", None, MISSING), arm_at_baselines=again("arm", None, MISSING))
    assert found.verdict is Verdict.NO_DIFFERENCE
    assert found.equal_rate is None


def test_a_folder_whose_verdict_waits_is_unfinished_and_says_for_what(tmp_path):
    """Tuning that chose 1.5e-3 for laser and 3e-3 for softmax; laser better at those rates."""
    plan = ComparePlan.build(preset="thorough", attention=["softmax", "laser"], steps=120)
    synthetic.write_comparison(tmp_path, plan, effects={"laser": -0.1})
    layout = Layout(tmp_path)
    for rate in plan.learning_rates:
        for arm in plan.arms:
            for seed in (1000, 1001):
                path = layout.tuning_run(arm, rate, seed) / "result.json"
                result = json.loads(path.read_text())
                best = 1.5e-3 if arm.name == "laser" else 3e-3
                result["summary"]["val_bits_per_byte"] = 2.0 + abs(np.log2(rate / best))
                path.write_text(json.dumps(result))
    results = collect(tmp_path)
    arm = results["arms"][1]
    assert results["complete"] is False
    assert results["missing"] == [f"softmax at learning rate 0.0015, seed {seed}" for seed in plan.seeds]
    assert results["headline"].startswith("Unfinished: 5 of 15 runs")
    assert arm["comparison"]["verdict"] == Verdict.NOT_JUDGED
    for seed in plan.seeds:
        folder = layout.equal_rate_run(plan.arm("softmax"), 1.5e-3, seed)
        synthetic.write_run(folder, plan, "softmax", seed, 2.6 + 0.01 * seed, np.random.default_rng(seed), 120, None)
    results = collect(tmp_path)
    assert results["complete"] is True
    assert results["arms"][1]["comparison"]["verdict"] == Verdict.BETTER
    assert results["arms"][1]["comparison"]["equal_rate"]["holds"] is True


@pytest.mark.usefixtures("in_process")
def test_compare_makes_the_runs_that_a_verdict_waits_for(text, tmp_path, monkeypatch):
    """A verdict is made to wait for the base at laser's rate: that is trained, counted nowhere else, and kept."""
    plan = test_run.small(text, arms=[], steps=3, learning_rates=[1e-3, 1e-2])
    wanted = [(plan.arm("softmax"), 1e-2)]
    monkeypatch.setattr(equal_rate, "wanted", lambda plan, comparisons: wanted)
    results = compare(plan, tmp_path / "c", progress=False)
    for seed in plan.seeds:
        folder = Layout(tmp_path / "c").equal_rate_run(plan.arm("softmax"), 1e-2, seed)
        config = json.loads((folder / "config.json").read_text())
        assert (config["optim"]["lr"], config["train"]["seed"]) == (1e-2, seed)
        assert json.loads((folder / "result.json").read_text())["status"] == "finished"
    assert len(results["runs"]) == 4
    monkeypatch.setattr(run, "run_tasks", lambda *_, **__: pytest.fail("trained again"))
    compare(plan, tmp_path / "c", progress=False)
