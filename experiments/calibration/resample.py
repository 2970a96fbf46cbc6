"""Comparisons drawn from the pool of real runs, judged as any other.

Comparisons that share runs are not independent. Each rate therefore comes with two intervals: over thousands of
comparisons drawn from the pool, by the jackknife over seeds (leaving out every comparison that used a seed, seed by
seed), which is what the pool as a whole says; and over the comparisons that share no seed and no run, few as they are,
by the exact binomial interval.

Legend: a arms, the baseline first; s seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from clearhead.compare import statistics as st
from clearhead.compare.verdict import Verdict
from experiments.calibration.judging import any_called, judge
from experiments.calibration.pool import AGAIN, ROUNDING, START, WORSE

SEEDS = (3, 5, 8, 12)
Drawn = tuple[bool, np.ndarray]


def table_of(runs: Sequence[Mapping[str, Any]], steps: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """Test values by arm over the seeds that every arm has; a run that diverged has nan. The repeated arm apart."""
    values = {(one["arm"], one["seed"]): one["test"] for one in runs if one["steps"] == steps}
    arms = (*START, *ROUNDING, WORSE)
    seeds = sorted({seed for _, seed in values if all((arm, seed) in values for arm in arms)})
    again = [seed for seed in seeds if (AGAIN, seed) in values]
    table = {arm: np.array([_number(values[arm, seed]) for seed in seeds]) for arm in arms}
    return table | {AGAIN: np.array([_number(values[AGAIN, seed]) for seed in again])}, seeds


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def study(runs: Sequence[Mapping[str, Any]], steps: int, draws: int) -> dict[str, Any] | None:
    """Everything that the page says of the pool; None while it has too few seeds."""
    table, seeds = table_of(runs, steps)
    if len(seeds) < 2 * SEEDS[0]:
        return None
    rng = np.random.default_rng(0)
    start_as = np.stack([table[arm] for arm in START])
    rounding_as = np.stack([table[arm] for arm in ROUNDING])
    sizes = [n for n in SEEDS if n <= len(seeds)]
    halves = [n for n in SEEDS if 2 * n <= len(seeds)]
    return {
        "seeds": len(seeds),
        "steps": steps,
        "runs": sum(one["steps"] == steps for one in runs),
        "cpu_seconds": sum(one["cpu_seconds"] for one in runs if one["steps"] == steps),
        "luck": luck(start_as, rounding_as),
        "identical": identical(table),
        "start": [alike(start_as, n, arms, draws, rng) for arms in (2, 4) for n in sizes],
        "rounding": [alike(rounding_as, n, 2, draws, rng, shuffle=False) for n in sizes],
        "planted": [planted(start_as, n, draws, rng) for n in halves],
        "lower_rate": [lower_rate(start_as, table[WORSE], n, draws, rng) for n in sizes],
    }


def luck(start_as: np.ndarray, rounding_as: np.ndarray) -> dict[str, Any]:
    """How large the luck of a run is, and how much of it the arms of a seed share."""
    pairs = [(i, j) for i in range(len(start_as)) for j in range(i)]
    differences = np.array([start_as[i] - start_as[j] for i, j in pairs])
    level = float(start_as.mean())
    return {
        "level": level,
        "sd_run": float(start_as.std(axis=1, ddof=1).mean()),
        "sd_difference": float(np.sqrt((differences**2).mean())),
        "relative_sd_difference": float(np.sqrt((differences**2).mean())) / level,
        "correlation": float(np.mean([np.corrcoef(start_as[i], start_as[j])[0, 1] for i, j in pairs])),
        "excess_kurtosis": float(stats.kurtosis(differences.ravel())),
        "rounding": float(np.abs(rounding_as[1] - rounding_as[0]).max()),
    }


def identical(table: Mapping[str, np.ndarray]) -> dict[str, Any] | None:
    """One configuration under two names: is it equal to the last bit, and what is said of it?"""
    again = table[AGAIN]
    if len(again) < 2:
        return None
    pair_as = np.stack([table[ROUNDING[0]][: len(again)], again])
    (found,) = judge(pair_as)
    return {"seeds": len(again), "largest": float(np.abs(pair_as[1] - pair_as[0]).max()), "verdict": found.verdict}


def alike(
    values_as: np.ndarray, n: int, arms: int, draws: int, rng: np.random.Generator, *, shuffle: bool = True
) -> dict[str, Any]:
    """Equal arms: how often is one called better or worse? `shuffle`: any arm of a seed may take any place."""

    def once() -> Drawn:
        seeds = rng.permutation(values_as.shape[1])[:n]
        return any_called(judge(_places(values_as, seeds, arms, rng, shuffle))), seeds

    called, apart = 0, 0
    groups = values_as.shape[1] // n
    for group in range(groups):
        seeds = np.arange(group * n, (group + 1) * n)
        for first in range(0, len(values_as) - arms + 1, arms):
            apart += 1
            called += any_called(judge(values_as[first : first + arms][:, seeds]))
    return {"arms": arms, "n": n} | _rate(once, values_as.shape[1], draws) | {"apart": apart, "apart_called": called}


def planted(values_as: np.ndarray, n: int, draws: int, rng: np.random.Generator) -> dict[str, Any]:
    """The effect that one comparison prints, planted in another one with other seeds: is it found?"""

    def once() -> Drawn:
        seeds = rng.permutation(values_as.shape[1])[: 2 * n]
        effect = judge(_places(values_as, seeds[:n], 2, rng))[0].detectable
        pair_as = _places(values_as, seeds[n:], 2, rng)
        pair_as[1] -= effect or 0.0
        return judge(pair_as)[0].verdict is Verdict.BETTER, seeds

    return {"n": n} | _rate(once, values_as.shape[1], draws)


def lower_rate(
    values_as: np.ndarray, worse_s: np.ndarray, n: int, draws: int, rng: np.random.Generator
) -> dict[str, Any]:
    """A real effect: how often is the lower rate called worse, beside what its size over all seeds foretells."""
    differences = worse_s - values_as
    effect, sd = float(differences.mean()), float(differences.std(axis=1, ddof=1).mean())

    def once() -> Drawn:
        seeds = rng.permutation(values_as.shape[1])[:n]
        pair_as = np.stack([_places(values_as, seeds, 1, rng)[0], worse_s[seeds]])
        return judge(pair_as)[0].verdict is Verdict.WORSE, seeds

    foretold = st.power_of_paired_t(effect, sd, n)
    return {"n": n, "effect": effect, "sd": sd, "foretold": foretold} | _rate(once, values_as.shape[1], draws)


def _places(
    values_as: np.ndarray, seeds: np.ndarray, arms: int, rng: np.random.Generator, shuffle: bool = True
) -> np.ndarray:
    """`arms` different arms of each seed; shuffled, because which stream is called first means nothing."""
    if not shuffle:
        return values_as[:arms, seeds].copy()
    return np.stack([values_as[rng.permutation(len(values_as))[:arms], seed] for seed in seeds], axis=1)


def _rate(once: Callable[[], Drawn], seeds: int, draws: int) -> dict[str, Any]:
    """The share of draws that are true, with the jackknife's interval over seeds."""
    drawn = [once() for _ in range(draws)]
    true = np.array([hit for hit, _ in drawn])
    used = np.zeros((draws, seeds), bool)
    for row, (_, which) in enumerate(drawn):
        used[row, which] = True
    without = np.array(
        [true[~used[:, seed]].mean() if not used[:, seed].all() else true.mean() for seed in range(seeds)]
    )
    error = math.sqrt((seeds - 1) / seeds * float(((without - without.mean()) ** 2).sum()))
    half = float(stats.t.ppf(0.975, seeds - 1)) * error
    rate = float(true.mean())
    return {"rate": rate, "low": max(0.0, rate - half), "high": min(1.0, rate + half), "draws": draws}
