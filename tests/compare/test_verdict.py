from __future__ import annotations

import numpy as np
import pytest

from clearhead.compare.verdict import Comparison, Outcomes, Status, Verdict, compare_outcomes

SEEDS = range(5)


def outcomes(name: str, values: list[float] | None, failed: dict[int, Status] | None = None) -> Outcomes:
    status = {seed: (failed or {}).get(seed, Status.FINISHED) for seed in SEEDS}
    finished = {s: float(v) for s, v in enumerate(values or []) if status[s] is Status.FINISHED}
    return Outcomes(name, status, finished)


BASE = [2.30, 2.32, 2.29, 2.35, 2.31]
SMALL = np.array([0.001, -0.001, 0.002, 0.0, -0.002])


def shifted(by: float) -> list[float]:
    return list(np.array(BASE) + SMALL + by)


def judge(arm: Outcomes, base: Outcomes | None = None) -> Comparison:
    return compare_outcomes(base or outcomes("softmax", BASE), [arm])[0]


def test_the_verdict_follows_the_interval():
    better, worse, same = (judge(outcomes("arm", shifted(by))) for by in (-0.05, 0.05, 0.0))
    assert better.verdict is Verdict.BETTER
    assert "arm is better than softmax: 0.0500 bits per byte (2.16%) lower" in better.sentence
    assert worse.verdict is Verdict.WORSE
    assert "0.0500 bits per byte (2.16%) higher" in worse.sentence
    assert same.verdict is Verdict.NO_DIFFERENCE
    assert f"a true difference of {same.detectable:.4f} bits per byte" in same.sentence
    assert "80% of the time" in same.sentence


def test_more_candidates_widen_every_interval_also_when_some_of_them_failed():
    arm = outcomes("arm", shifted(0.01))
    dead = [outcomes(f"dead{i}", None, dict.fromkeys(SEEDS, Status.CRASHED)) for i in range(3)]
    alone, among = judge(arm).interval, compare_outcomes(outcomes("softmax", BASE), [arm, *dead])[0].interval
    assert alone is not None
    assert among is not None
    assert among.high - among.low > alone.high - alone.low
    assert among.confidence == pytest.approx(1 - 0.05 / 4)


@pytest.mark.parametrize("status", [Status.DIVERGED, Status.CRASHED])
def test_an_arm_with_a_failed_run_is_never_called_better_but_may_be_worse(status):
    good = judge(outcomes("arm", shifted(-0.05), {3: status}))
    assert good.verdict is Verdict.NOT_JUDGED
    assert f"1 of the 5 runs of arm {status} (seed 3)." in good.sentence
    assert "Compared over the 4 of 5 seeds where both finished." in good.sentence
    assert good.seeds == [0, 1, 2, 4]
    assert judge(outcomes("arm", shifted(0.05), {3: status})).verdict is Verdict.WORSE


def test_a_failed_baseline_run_is_dropped_from_the_pairs_and_said():
    base = outcomes("softmax", BASE, {0: Status.DIVERGED})
    found = judge(outcomes("arm", shifted(-0.05)), base)
    assert found.verdict is Verdict.BETTER
    assert "1 of the 5 runs of softmax diverged (seed 0)." in found.sentence


@pytest.mark.parametrize(
    ("status", "verdict"), [(Status.DIVERGED, Verdict.DIVERGED), (Status.CRASHED, Verdict.CRASHED)]
)
def test_an_arm_without_a_finished_run(status, verdict):
    found = judge(outcomes("arm", None, dict.fromkeys(SEEDS, status)))
    assert found.verdict is verdict
    assert f"arm {status}: none of its 5 runs finished" in found.sentence
    assert found.mean is found.interval is found.p_holm is None


def test_a_baseline_without_a_finished_run_leaves_nothing_to_compare():
    found = judge(outcomes("arm", shifted(0)), outcomes("softmax", None, dict.fromkeys(SEEDS, Status.DIVERGED)))
    assert found.verdict is Verdict.NOT_JUDGED
    assert "no seed at which both arm and softmax finished" in found.sentence


def test_identical_arms_show_no_difference_and_constant_ones_are_not_judged():
    same = judge(outcomes("arm", BASE))
    assert same.verdict is Verdict.NO_DIFFERENCE
    assert "exactly equal to softmax on every seed" in same.sentence
    moved = judge(outcomes("arm", [value + 0.25 for value in BASE]))
    assert moved.verdict is Verdict.NOT_JUDGED
    assert "no spread" in moved.sentence


def test_one_pair_is_not_judged():
    found = judge(outcomes("arm", shifted(-0.05), dict.fromkeys(range(1, 5), Status.DIVERGED)))
    assert found.verdict is Verdict.NOT_JUDGED
    assert "one pair of runs" in found.sentence
    assert found.interval is None


def test_missing_runs_make_everything_interim():
    found = judge(outcomes("arm", shifted(-0.05), {4: Status.MISSING}))
    assert found.verdict is Verdict.NOT_JUDGED
    assert "not judged yet: 1 of the 10 runs" in found.sentence
    assert found.interval is not None  # shown, but nothing is concluded from it


def test_a_p_value_below_the_level_under_no_difference_is_explained():
    rng = np.random.default_rng(0)
    for _ in range(500):
        noise = rng.normal(0, 0.01, 5)
        arms = [outcomes("a", list(np.array(BASE) + 0.0135 + noise)), outcomes("b", shifted(0.5))]
        found = compare_outcomes(outcomes("softmax", BASE), arms)[0]
        if found.verdict is Verdict.NO_DIFFERENCE and found.p_holm is not None and found.p_holm < 0.05:
            assert "Holm's test" in found.sentence
            return
    pytest.fail("the case did not come up")


def test_no_sentence_holds_nan_or_none():
    for failed in (Status.DIVERGED, Status.CRASHED, Status.MISSING):
        for count in range(6):
            for by in (-0.05, 0.0, 0.05):
                status = dict.fromkeys(range(count), failed)
                for found in (
                    judge(outcomes("arm", shifted(by), status)),
                    judge(outcomes("arm", shifted(by)), outcomes("softmax", BASE, status)),
                ):
                    assert "nan" not in found.sentence.lower()
                    assert "None" not in found.sentence
                    assert found.sentence.endswith(".")
