"""experiments/equal_rate: equal arms that tuning told apart are judged *no difference shown*, in every experiment that
chooses learning rates and judges by itself; only the runs that a verdict waits for are asked for."""

from __future__ import annotations

import json
import math
from multiprocessing.pool import ThreadPool

import numpy as np
import pytest
from experiments.admin import report as admin_report
from experiments.admin import translation as talk
from experiments.deep_thin import judge as deep_thin
from experiments.deep_thin.settings import SETTINGS, SHALLOW
from experiments.deep_thin.tables import tables
from experiments.deep_thin.text_runs import language_plan, run_config
from experiments.equal_rate import Ledger, Run, words
from experiments.laser import prefix_max, text, text_page
from experiments.positions import lengths
from experiments.positions import report as positions_report
from experiments.selective import judge as claims
from experiments.selective import tuned
from experiments.self_adjust import judge as self_adjust

from clearhead.compare import costs
from clearhead.compare.layout import Layout
from clearhead.compare.plan import TUNING_SEED, ComparePlan
from clearhead.compare.verdict import Verdict
from experiments import equal_rate
from tests.compare import synthetic
from tests.experiments import test_deep_thin

SEEDS = range(5)
SLOW, FAST = 1e-3, 2e-3
GAIN = {SLOW: 0.0, FAST: -0.1}
"""What the faster rate is worth, to any arm."""


def value(arm: str, rate: float, seed: int, better: float = 0.0) -> float:
    """A run: the seed's luck, the run's own, the rate, and what the arm "b" is truly better by."""
    own = 0.004 * math.sin(7.0 * seed + sum(map(ord, arm)) + 1e4 * rate)
    return 2.0 + 0.05 * math.sin(3.0 * seed) + own + GAIN[rate] - better * (arm == "b")


def ledger(places, better: float = 0.0, chosen=None) -> Ledger:
    runs = [Run(a, r, s, "finished", value(a, r, s, better)) for a, r in places for s in SEEDS]
    return Ledger(runs, chosen or {"a": SLOW, "b": FAST}, SEEDS)


OWN = [("a", SLOW), ("b", FAST)]


@pytest.mark.parametrize(("baseline", "arm", "before"), [("a", "b", "better"), ("b", "a", "worse")])
def test_equal_arms_that_tuning_told_apart_show_no_difference(baseline, arm, before):
    waiting = ledger(OWN).against(baseline, [arm])[arm]
    assert waiting.verdict is Verdict.NOT_JUDGED
    assert equal_rate.wanted([waiting]) == [("a", FAST)]  # the one that lost, at the rate of the one that won
    assert "5 runs of a at the learning rate 0.002 wait" in words(str(waiting.verdict), waiting.equal_rate)
    judged = ledger([*OWN, ("a", FAST)]).against(baseline, [arm])[arm]
    assert judged.verdict is Verdict.NO_DIFFERENCE
    assert "but that of their learning rates" in words(str(judged.verdict), judged.equal_rate)
    held = ledger([*OWN, ("a", FAST)], better=0.2).against(baseline, [arm])[arm]
    assert held.verdict == before
    assert words(before, equal_rate.plain(held.equal_rate)) == before
    json.dumps(equal_rate.plain(held.equal_rate))


def test_arms_of_one_rate_and_arms_without_a_difference_ask_for_nothing():
    same = ledger([("a", SLOW), ("b", SLOW)], better=0.2, chosen={"a": SLOW, "b": SLOW})
    found = same.against("a", ["b"])["b"]
    assert found.verdict is Verdict.BETTER
    assert equal_rate.wanted([found]) == []
    level = ledger(OWN, better=-0.1).against("a", ["b"])["b"]  # truly worse by what its rate is worth
    assert level.verdict is Verdict.NO_DIFFERENCE
    assert equal_rate.wanted([level]) == []


def test_every_pair_is_held_to_the_rule_and_intervals_hold_together():
    places = [*OWN, ("c", SLOW)]
    found = ledger(places, chosen={"a": SLOW, "b": FAST, "c": SLOW}).pairs([("b", "a"), ("b", "c"), ("a", "c")])
    assert equal_rate.wanted(found) == [("a", FAST), ("c", FAST)]
    assert found[0].interval.confidence == pytest.approx(1 - 0.05 / 3)


def test_a_run_without_a_value_failed_and_a_seed_without_a_run_is_missing():
    made = Ledger([Run("a", SLOW, 0, "finished", math.nan), Run("a", SLOW, 9, "finished", 1.0)], {"a": SLOW}, [0, 1])
    found = made.outcomes("a")
    assert [str(found.status[seed]) for seed in (0, 1)] == ["diverged", "missing"]
    assert found.values == {}


# ---- in a comparison's folder ----


def test_runs_for_pairs_that_compare_does_not_judge_stand_beside_its_own(tmp_path, monkeypatch):
    plan = ComparePlan.build(preset="thorough", attention=["softmax", "laser"], steps=120)
    folder = tmp_path / "c"
    synthetic.write_comparison(folder, plan)
    asked = []
    monkeypatch.setattr("clearhead.compare.run.run_missing", lambda title, tasks, plan, show: asked.extend(tasks))
    equal_rate.train_in_folder(plan, folder, [])
    assert asked == []
    equal_rate.train_in_folder(plan, folder, [("laser", 1.5e-3)])
    assert [task.folder for task in asked] == [
        Layout(folder).equal_rate_run(plan.arm("laser"), 1.5e-3, seed) for seed in plan.seeds
    ]
    assert {task.config["optim"]["lr"] for task in asked} == {1.5e-3}
    assert all(task.config["train"]["test_tokens"] != 1 for task in asked)
    chosen = {"softmax": 1.5e-3, "laser": 3e-3}
    assert list(equal_rate.further_records(plan, folder, chosen)) == []
    synthetic.write_run(asked[1].folder, plan, "laser", asked[1].seed, 2.5, np.random.default_rng(0), 120, None)
    ((rate, record),) = equal_rate.further_records(plan, folder, chosen)
    assert (rate, record.arm, record.seed) == (1.5e-3, "laser", asked[1].seed)


# ---- selective ----


def selective_run(arm, rate, seed, better=0.0, **more):
    return {
        "arm": arm, "setting": "", "rate": rate, "seed": seed, "steps": 7, "status": "finished",
        "val": abs(rate - (SLOW if arm == "a" else FAST)), "x": value(arm, rate, seed, better),
    } | more  # fmt: skip


def claim(**more):
    return claims.Claim("b has less x than a", "b", "a", "x", lambda run: run["x"], **more)


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize(("better", "margin", "verdict"), [
    (0.0, 0.0, claims.UNTOLD), (0.2, 0.0, claims.CONFIRMED), (0.2, 0.1, claims.CONFIRMED), (0.2, 0.25, claims.UNTOLD),
    (0.2, 0.5, claims.REFUTED),
])  # fmt: skip
def test_a_claim_must_hold_at_one_rate_with_its_margin(better, margin, verdict, higher):
    """At the chosen rates b is ahead by `better` and a tenth more, which is the rate's."""

    def turned(runs):
        return [run | {"x": -run["x"]} if higher else run for run in runs]

    own = turned(selective_run(arm, rate, seed, better) for arm, rate in OWN for seed in SEEDS)
    asked = claim(margin=margin, higher=higher)
    (waiting,) = claims.judge([asked], own)
    assert waiting["verdict"] == claims.WAITS
    ahead = margin < better + 0.1
    assert claims.wanted([waiting]) == [("a", "", FAST) if ahead else ("b", "", SLOW)]
    again = turned(selective_run(arm, rate, seed, better) for arm, rate in (("a", FAST), ("b", SLOW)) for seed in SEEDS)
    (judged,) = claims.judge([asked], own, again)
    assert judged["verdict"] == verdict
    assert ("not so at one learning rate" in judged["why"]) == (verdict == claims.UNTOLD)
    # What is said of one rate is the difference there, in the claim's own direction.
    assert judged["equal_rate"]["mean"] == pytest.approx((1 if higher else -1) * better, abs=0.01)
    json.dumps(judged)


def test_a_part_runs_what_its_claims_wait_for_and_reads_files_that_lack_it(tmp_path, monkeypatch):
    class Threads:
        def get_context(self, _):
            return self

        def Pool(self, workers):
            return ThreadPool(workers)

    monkeypatch.setattr("experiments.running.multiprocessing", Threads())
    plan = tuned.Plan(("a", "b"), (SLOW, FAST), steps=7, seeds=len(SEEDS))
    path = tmp_path / "runs.jsonl"

    def train(job):
        return selective_run(job.arm, job.rate, job.seed)

    before = tuned.run_plan(plan, path, train, workers=1)
    assert before["again"] == []
    kept = path.read_text()
    found = tuned.run_plan(plan, path, train, workers=1, families=[[claim()]])
    assert path.read_text().startswith(kept)
    assert {(run["arm"], run["rate"]) for run in found["again"]} == {("a", FAST)}
    assert sorted(run["seed"] for run in found["again"]) == list(SEEDS)
    assert found["runs"] == before["runs"]
    assert claims.judge([claim()], found["runs"], found["again"])[0]["verdict"] == claims.UNTOLD


# ---- laser ----


def laser_run(arm, rate, seed):
    lucky = FAST if arm == "LASER" else SLOW
    error = abs(rate - lucky) if seed >= TUNING_SEED else value(arm, rate, seed)
    return {
        "arm": arm, "rate": rate, "seed": seed, "error": error, "value_spread": 1.0, "cpu_seconds": 1.0,
        "by_length": dict.fromkeys(map(str, prefix_max.LENGTHS), error),
    }  # fmt: skip


def test_prefix_max_holds_equal_arms_equal():
    tuning = [laser_run(a, r, TUNING_SEED) for a in ("softmax", "LASER") for r in (SLOW, FAST)]
    own = [laser_run(a, r, s) for a, r in (("softmax", SLOW), ("LASER", FAST)) for s in SEEDS]
    jobs = prefix_max.equal_rate_jobs([*tuning, *own])
    assert [job.key for job in jobs] == [("softmax", FAST, seed) for seed in SEEDS]
    assert prefix_max.summary([*tuning, *own])[1]["verdict"] == "not judged"
    runs = [*tuning, *own, *(laser_run(*job.key) for job in jobs)]
    rows = prefix_max.summary(runs)
    assert rows[1]["verdict"].startswith("no difference shown")
    assert rows[0]["seeds"] == len(SEEDS)  # runs at another's rate count nowhere else
    assert "but that of their learning rates" in "\n".join(prefix_max.page(rows))
    assert prefix_max.equal_rate_jobs(runs) == jobs


def laser_arm(name, rate):
    return {
        "name": name, "rate": rate, "tests": {str(s): value(name, rate, s) for s in SEEDS}, "bits": [], "tokens": [],
        "speed": None,
    }  # fmt: skip


def test_a_pair_of_text_arms_is_held_to_one_rate():
    arms = [laser_arm("softmax+learned", SLOW), laser_arm("laser+learned", FAST)]
    (row,) = text.pairs(arms)
    assert (row["verdict"], row["equal_rate"]["anew"]) == ("not judged", "softmax+learned")
    again = [
        {"arm": "softmax+learned", "rate": FAST, "seed": s, "status": "finished", "value": value("s", FAST, s)}
        for s in SEEDS
    ]
    (row,) = text.pairs(arms, again)
    assert row["verdict"] == Verdict.NO_DIFFERENCE
    assert "but that of their learning rates" in text_page.judge({"pairs": [row]})[0]


# ---- self_adjust ----


def test_self_adjust_holds_pairs_against_range_to_one_rate():
    def arm(name, rate):
        seeds = [str(s) for s in SEEDS]
        return {
            "name": name, "rate": rate, "status": dict.fromkeys(seeds, "finished"),
            "tests": {s: value(name, rate, int(s)) for s in seeds},
        }  # fmt: skip

    plan = {"seeds": list(SEEDS), "arms": [arm("softmax", SLOW), arm("range", SLOW), arm("row sum alone", FAST)]}
    assert self_adjust.wanted({"forms": plan}) == [("softmax", FAST), ("range", FAST)]
    again = [
        {"arm": name, "rate": FAST, "seed": s, "status": "finished", "value": value(name, FAST, s)}
        for name in ("softmax", "range")
        for s in SEEDS
    ]
    made = self_adjust.families({"forms": plan | {"again": again}})
    for family in ("controls", "against range"):
        found = made[family]["row sum alone"]
        assert found.verdict is Verdict.NO_DIFFERENCE
        assert "but that of their learning rates" in self_adjust.said(found)
    assert (
        self_adjust.carried(made["controls"]["row sum alone"], made["against range"]["row sum alone"]) == "not decided"
    )


# ---- deep_thin ----


def test_deep_thin_names_what_it_has_not_checked_and_then_checks_it():
    setting = SETTINGS["language"]
    slow, fast = setting.rates[:2]
    tests = {arm.name: [value(arm.name, SLOW if arm == SHALLOW else FAST, s) for s in SEEDS] for arm in setting.arms}
    runs = test_deep_thin.runs_of(setting, tests)
    for run in runs:  # the shallow arm chose the lower rate
        if run["arm"] == "shallow":
            if run["seed"] == test_deep_thin.CHOOSING_SEED:
                run["val"] = run["rate"]
            else:
                run["rate"] = slow
    assert deep_thin.wanted(setting, runs) == [("shallow", fast)]
    page = "\n".join(tables([deep_thin.judge(setting, runs, test_deep_thin.SPEED)]))
    assert "| better at the rates that each chose; not checked at one rate |" in page
    assert f"5 runs of {SHALLOW.words} at {fast:g} would show it" in page
    again = [run | {"rate": fast, "test": value("x", FAST, run["seed"])} for run in runs if run["arm"] == "shallow"]
    runs += [run for run in again if run["seed"] in SEEDS]
    result = deep_thin.judge(setting, runs, test_deep_thin.SPEED)
    assert [pair["verdict"] for pair in result["pairs"]] == [str(Verdict.NO_DIFFERENCE)] * 3
    page = "\n".join(tables([result]))
    assert "but that of their learning rates" in page
    assert "Not checked" not in page


def test_a_single_language_run_is_the_comparisons_own():
    setting = SETTINGS["language"]
    plan = language_plan(setting)
    for arm in setting.arms:
        made = costs.run_config(plan.arm(arm.name).apply(plan.base), steps=setting.steps, seed=3, rate=1e-2)
        assert made == run_config(setting, arm, 1e-2, 3, judged=True)


# ---- positions, admin ----


def test_positions_wait_for_runs_at_one_rate_in_every_quantity():
    def run(arm, rate, seed):
        test = {"128": value(arm, rate, seed), "512": 2.0 + 0.01 * seed, "1024": 2.0 + 2.0 * value(arm, rate, seed)}
        return {"arm": arm, "rate": rate, "seed": seed, "status": "finished", "test": test} | {
            "parameters": 1, "train_seconds": 1.0, "score_seconds": 1.0, "scored": {"tokens": 1, "documents": 1},
        }  # fmt: skip

    other = next(arm for arm in lengths.ARMS if arm != lengths.BASELINE)
    runs = [run(arm, rate, s) for arm, rate in ((lengths.BASELINE, SLOW), (other, FAST)) for s in SEEDS]
    assert positions_report.wanted(runs) == [(lengths.BASELINE, FAST)]
    found = positions_report.scores(runs, [run(lengths.BASELINE, FAST, s) for s in SEEDS])
    assert {one["verdict"] for own in found["verdicts"].values() for one in own} == {str(Verdict.NO_DIFFERENCE)}
    assert "but that of their learning rates" in "\n".join(positions_report.scores_table(found))
    assert all(row["seeds"] == len(SEEDS) for row in found["rows"])


def test_admin_holds_both_quantities_to_one_rate():
    def run(arm, lr, seed):
        test = value(arm, lr, seed)
        return {"arm": arm, "lr": lr, "seed": seed, "status": "finished", "test": test, "chrf": 10 - test}

    chosen = dict.fromkeys(talk.ARMS, SLOW) | {"Pre-LN": FAST}
    runs = [run(arm, chosen[arm], s) for arm in talk.ARMS for s in SEEDS]
    wanted = admin_report.wanted(runs, chosen)
    assert wanted == [("Post-LN", FAST), ("Post-LN with Admin", FAST)]
    runs += [run(arm, lr, s) for arm, lr in wanted for s in SEEDS]
    found = admin_report._verdicts(runs, chosen)
    assert {one["verdict"] for one in found} == {str(Verdict.NO_DIFFERENCE)}
    checked = [one for one in found if one["equal_rate"]]
    assert {one["quantity"] for one in checked} == {"test", "chrf"}
    for one in checked:  # said in the quantity's own direction
        assert one["equal_rate"]["interval"]["low"] < one["equal_rate"]["mean"] < one["equal_rate"]["interval"]["high"]
