"""The small, seeded version of experiments/calibration: fails only for a real fault.

Each bound is the binomial quantile that a rate which keeps its promise passes with probability 1e-6 (and the draws are
seeded, so a test that passes once always does, unless the code that judges changes).
"""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from experiments.calibration import pool, report, resample, trials
from experiments.calibration.judging import judge
from experiments.calibration.trials import Case, Job
from experiments.calibration.worlds import ALIKE
from scipy import stats

from clearhead.compare import statistics as st

FALSE_ALARM = 1e-6


def count(kind: str, world: str, arms: int, seeds: int, number: int) -> dict[str, int]:
    counts = trials.run_one(Job(Case(kind, world, arms, seeds), 0, number))["counts"]
    return {name: int(counts.get(name, 0)) for name in {*counts, "called"}}


def at_most(share: float, number: int) -> int:
    """The most hits of a share that keeps to `share`."""
    return int(stats.binom.isf(FALSE_ALARM, number, share))


@pytest.mark.parametrize("world", [world for world in ALIKE if world != "identical"])
def test_equal_arms_are_called_different_at_most_one_time_in_twenty(world):
    assert count("alike", world, 4, 5, 250)["called"] <= at_most(0.05, 250)


def test_equal_arms_of_a_grid_are_called_different_at_most_one_time_in_twenty_and_were_more_often():
    found = count("grid", "1.5", 4, 12, 250)
    assert found["called"] <= at_most(0.05, 250)
    assert found["called_before"] > at_most(0.05, 250)  # the fault that the check at one rate mends, and its power here


def test_the_effect_that_is_printed_is_found_four_times_in_five():
    number = 300
    found = count("power", "normal", 2, 5, number)
    low, high = (int(stats.binom.ppf(q, number, 0.8)) for q in (FALSE_ALARM / 2, 1 - FALSE_ALARM / 2))
    assert low <= found["printed"] <= high
    assert low <= found["known"] <= high
    assert found["naive"] < found["printed"]


def test_the_printed_effect_has_its_power_on_average_over_the_spreads_that_a_comparison_may_see():
    """By quadrature that shares nothing with the code: density of s, and scipy's noncentral t."""
    n, alpha = 5, 0.05 / 3
    factor = st.detectable_effect(1.0, n, comparisons=3, sd_df=n - 1)
    s = np.linspace(1e-3, 5, 4001)
    density = stats.chi.pdf(s * math.sqrt(n - 1), n - 1) * math.sqrt(n - 1)
    power = [st.power_of_paired_t(factor * one, 1.0, n, alpha=alpha) for one in s]
    assert float(np.trapezoid(density * np.array(power), s)) == pytest.approx(0.8, abs=2e-3)


def test_one_configuration_under_two_names_shows_no_difference():
    found = judge(ALIKE["identical"](np.random.default_rng(0), 3, 5)[0])
    assert [one.verdict for one in found] == ["no difference shown at this size"] * 2
    assert all(one.mean == 0.0 for one in found)


def test_arms_of_the_pool_differ_in_what_means_nothing_and_a_repeated_one_in_nothing():
    steps = 3
    arms = [*pool.START[:2], *pool.ROUNDING, pool.AGAIN]
    ends = {arm: pool.train_one(pool.Job(arm, 0, steps))["test"] for arm in arms}
    assert ends[pool.AGAIN] == ends[pool.ROUNDING[0]]
    assert ends[pool.START[0]] != ends[pool.START[1]]
    assert ends[pool.ROUNDING[1]] == pytest.approx(ends[pool.ROUNDING[0]], abs=1e-5)


def test_the_study_of_a_pool_counts_what_was_put_into_it():
    """A made-up pool: equal arms are seldom called, a large real effect always is, and the jackknife holds its rate."""
    rng = np.random.default_rng(5)
    runs = []
    for seed in range(24):
        luck = rng.normal(0, 0.02)
        for arm in (*pool.START, *pool.ROUNDING, pool.WORSE, pool.AGAIN):
            value = 3.0 + luck + rng.normal(0, 0.01) + (1.0 if arm == pool.WORSE else 0.0)
            value = 3.0 + luck if arm in (pool.ROUNDING[0], pool.AGAIN) else value
            runs.append({"arm": arm, "seed": seed, "steps": 7, "test": value, "cpu_seconds": 1.0})
    found = resample.study(runs, 7, 60)
    assert found is not None
    assert found["identical"]["largest"] == 0.0
    assert found["luck"]["correlation"] > 0.5
    assert [row["rate"] for row in found["lower_rate"]] == [1.0] * 4
    assert all(row["low"] <= row["rate"] <= row["high"] for row in found["start"])
    assert all(row["rate"] < 0.3 for row in found["start"])
    assert found["start"][0]["apart"] == 16
    assert "called different in" in " ".join(report.verdicts([], found))
    assert json.dumps(found)
