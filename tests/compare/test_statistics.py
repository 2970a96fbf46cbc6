from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clearhead.compare import statistics as st
from clearhead.compare.verdict import Outcomes, Status, Verdict, compare_outcomes


def test_bits_per_byte_is_the_byte_weighted_mean_of_the_documents():
    n_bytes = np.array([100.0, 300.0, 50.0])
    bits = np.array([2.0, 1.0, 4.0])
    nats = bits * math.log(2) * n_bytes
    assert st.bits_per_byte(nats, n_bytes) == pytest.approx((200 + 300 + 200) / 450)
    assert st.bits_per_byte(nats, n_bytes) == pytest.approx(st.weighted_mean(bits, n_bytes))
    with pytest.raises(ValueError, match="at least one byte"):
        st.bits_per_byte([], [])


def test_pairs_are_the_seeds_where_both_have_a_finite_value():
    seeds, d = st.paired_differences({0: 1.0, 1: 2.0, 2: math.nan, 4: 9.0}, {0: 0.5, 1: 2.5, 2: 1.0, 3: 1.0})
    assert seeds == [0, 1]
    assert d.tolist() == [0.5, -0.5]


def test_interval_by_hand():
    # mean 3, s = sqrt(2.5), t(0.975, 4) = 2.776445: half width 2.776445 * 1.5811388 / sqrt(5) = 1.963243
    interval = st.student_interval(np.array([1.0, 2.0, 3.0, 4.0, 5.0]))
    assert interval is not None
    assert (interval.low, interval.high) == pytest.approx((3 - 1.963243, 3 + 1.963243), abs=1e-6)


def test_interval_and_p_value_equal_scipys_paired_test():
    rng = np.random.default_rng(1)
    for n in (2, 5, 12):
        a, b = rng.normal(size=n), rng.normal(0.3, 1, size=n)
        for comparisons in (1, 4):
            result = stats.ttest_rel(a, b)
            scipys = result.confidence_interval(1 - 0.05 / comparisons)
            interval = st.student_interval(a - b, comparisons=comparisons)
            assert interval is not None
            assert (interval.low, interval.high) == pytest.approx((scipys.low, scipys.high))
            assert interval.confidence == pytest.approx(1 - 0.05 / comparisons)
        assert st.student_p_value(a - b) == pytest.approx(result.pvalue)


@pytest.mark.parametrize("d", [[], [0.3], [0.0, 0.0, 0.0], [0.25, 0.25]])
def test_without_spread_there_is_no_interval_and_no_p_value(d):
    x = np.array(d)
    assert st.student_interval(x) is None
    assert st.student_p_value(x) is None
    assert st.bootstrap_interval(x) is None


def test_holm_by_hand_and_without_the_undefined():
    assert st.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert st.holm([0.4, None, 0.9]) == [0.8, None, 0.9]
    assert st.holm([None]) == [None]


def test_bootstrap_only_from_eight_seeds_and_near_students_interval():
    d = np.random.default_rng(3).normal(0.5, 1.0, 40)
    assert st.bootstrap_interval(d[: st.BOOTSTRAP_FROM - 1]) is None
    own, students = st.bootstrap_interval(d), st.student_interval(d)
    assert own is not None
    assert students is not None
    assert (own.low, own.high) == pytest.approx((students.low, students.high), abs=0.08)
    assert own == st.bootstrap_interval(d)  # the resampling is seeded


def test_power_equals_published_values():
    # Cohen's d = 0.5, two-sided 5 %, 34 pairs: 0.8078 (G*Power 3, matched pairs).
    assert st.power_of_paired_t(0.5, 1.0, 34) == pytest.approx(0.8077775, abs=1e-5)
    assert st.power_of_paired_t(0.0, 1.0, 5) == pytest.approx(0.05)
    assert st.power_of_paired_t(-0.5, 1.0, 34) == st.power_of_paired_t(0.5, 1.0, 34)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("comparisons", [1, 3, 9])
def test_detectable_effect_has_the_power_it_promises_and_scales_with_the_spread(n, comparisons):
    effect = st.detectable_effect(0.02, n, comparisons=comparisons)
    assert effect is not None
    assert st.power_of_paired_t(effect, 0.02, n, alpha=0.05 / comparisons) == pytest.approx(0.8, abs=1e-6)
    assert st.detectable_effect(0.04, n, comparisons=comparisons) == pytest.approx(2 * effect)


def test_detectable_effect_is_undefined_without_spread_or_pairs():
    assert st.detectable_effect(0.0, 5) is None
    assert st.detectable_effect(0.1, 1) is None
    with pytest.raises(ValueError, match="power"):
        st.detectable_effect(0.1, 5, power=1.0)


def simulate(trials: int, effects: list[float], seeds: int, rng: np.random.Generator):
    """Whole comparisons of made-up values: luck shared by a seed's runs, and noise of each run's own."""
    for _ in range(trials):
        luck = rng.normal(0, 0.02, seeds)
        arms = [
            Outcomes(
                str(i),
                dict.fromkeys(range(seeds), Status.FINISHED),
                dict(enumerate(2.3 + luck + effect + rng.normal(0, 0.01, seeds))),
            )
            for i, effect in enumerate([0.0, *effects])
        ]
        yield compare_outcomes(arms[0], arms[1:])


def test_equal_arms_are_called_different_in_at_most_five_percent_of_comparisons():
    trials = 2000
    comparisons = simulate(trials, [0.0, 0.0, 0.0], 5, np.random.default_rng(11))
    wrong = sum(any(c.verdict in (Verdict.BETTER, Verdict.WORSE) for c in arms) for arms in comparisons)
    assert wrong / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert wrong / trials > 0.015  # and the intervals are not idly wide: the three share one baseline


def test_an_effect_of_the_detectable_size_is_found_in_about_four_of_five_comparisons():
    trials, sd = 2000, 0.01 * math.sqrt(2)  # of a difference of two runs
    effect = st.detectable_effect(sd, 5, comparisons=3)
    assert effect is not None
    found = sum(
        arms[0].verdict is Verdict.BETTER
        for arms in simulate(trials, [-effect, 0.0, 0.0], 5, np.random.default_rng(12))
    )
    assert found / trials == pytest.approx(0.8, abs=3 * math.sqrt(0.8 * 0.2 / trials))


def test_first_reach_reads_between_evaluations():
    assert st.first_reach([10, 20, 30], [3.0, 2.0, 1.0], 1.5) == pytest.approx(25)
    assert st.first_reach([10, 20, 30], [3.0, 2.0, 1.0], 3.5) == 10
    assert st.first_reach([10, 20, 30], [3.0, math.nan, 1.0], 1.0) == 30
    assert st.first_reach([10, 20, 30], [3.0, 2.0, 1.0], 0.5) is None
    assert st.first_reach([], [], 0.5) is None


def test_gradient_tail_counts_what_stands_out_of_its_own_past():
    norms = np.ones(300)
    norms[[150, 200]] = [11.0, 9.9]  # only the first is more than 10 times the median before it
    norms[250] = np.inf
    tail = st.gradient_tail(norms)
    assert tail is not None
    assert (tail.median, tail.largest, tail.spikes, tail.steps) == (1.0, 11.0, 1, 299)
    assert st.gradient_tail([math.nan]) is None


def test_bands():
    curves = [np.array([1.0, 2.0]), np.array([3.0, 2.0])]
    mean, low, high = st.mean_band(curves)
    assert (mean.tolist(), low.tolist(), high.tolist()) == ([2, 2], [1, 2], [3, 2])
    mean, low, high = st.student_band(curves)
    expected = stats.t.ppf(0.975, 1) * math.sqrt(2) / math.sqrt(2)
    assert (mean - low).tolist() == pytest.approx([expected, 0.0])
    assert st.student_band(curves[:1])[1].tolist() == [1.0, 2.0]
