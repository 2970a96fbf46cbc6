"""From drawn values to verdicts, through the functions that judge a real comparison: `results.judge` and `tuning.best`.

Legend: a arms, the baseline first; s seeds; r learning rates of the grid; t tuning seeds.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.compare import results, tuning
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import Record, outcomes
from clearhead.compare.verdict import Comparison, Rates, Status, Verdict

NOWHERE = Path("made-up")
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
CALLED = (Verdict.BETTER, Verdict.WORSE)


@lru_cache
def plan_of(arms: int, seeds: int) -> ComparePlan:
    """A plan of that many arms; they are told apart by a batch size that nothing here ever uses."""
    texts = [f"{name(i)}: train.batch_size={i + 1}" for i in range(arms)]
    return ComparePlan.build(preset="quick", arms=texts, seeds=seeds)


def name(place: int) -> str:
    """What an arm is called."""
    return f"arm {place}" if place else "baseline"


def records(arm: str, values_s: np.ndarray, diverged_s: np.ndarray | None = None) -> list[Record]:
    """Runs as they are read from a folder."""
    lost = np.zeros(len(values_s), bool) if diverged_s is None else diverged_s
    return [
        Record(arm, seed, NOWHERE, Status.DIVERGED)
        if lost[seed]
        else Record(arm, seed, NOWHERE, Status.FINISHED, test=float(value))
        for seed, value in enumerate(values_s)
    ]


def judge(
    values_as: np.ndarray,
    diverged_as: np.ndarray | None = None,
    rates: dict[str, Rates] | None = None,
    resamples: int = 0,
) -> list[Comparison]:
    """The candidates' comparisons, in order."""
    plan = plan_of(*values_as.shape)
    runs = {
        name(i): records(name(i), values_s, None if diverged_as is None else diverged_as[i])
        for i, values_s in enumerate(values_as)
    }
    found = results.judge(plan, runs, rates, resamples=resamples)
    return [found[name(i)] for i in range(1, len(values_as))]


def judge_grid(values_ars: np.ndarray, tuning_art: np.ndarray) -> tuple[list[Comparison], list[Comparison], bool]:
    """The comparisons after each arm has chosen its rate: by the rule, and as they were without its check at one rate.

    Also whether all arms chose alike. `values_ars` are the test values at every rate of the grid, of which only those
    are looked at that a comparison would have trained.
    """
    chosen = [_chosen(tuning_rt) for tuning_rt in tuning_art]
    arms = len(values_ars)
    values_as = np.stack([values_ars[i, chosen[i]] for i in range(arms)])
    rates = {
        name(i): Rates(
            own=RATES[chosen[i]],
            baselines=RATES[chosen[0]],
            baseline_at_own=outcomes(name(0), records(name(0), values_ars[0, chosen[i]])),
            arm_at_baselines=outcomes(name(i), records(name(i), values_ars[i, chosen[0]])),
        )
        for i in range(1, arms)
        if chosen[i] != chosen[0]
    }
    return judge(values_as, rates=rates), judge(values_as), len(set(chosen)) == 1


def _chosen(tuning_rt: np.ndarray) -> int:
    rows: list[dict[str, Any]] = [
        {"rate": rate, "val": float(mean)} for rate, mean in zip(RATES, tuning_rt.mean(-1), strict=True)
    ]
    return RATES.index(tuning.best(rows))


def any_called(found: list[Comparison]) -> bool:
    """Whether some arm is called better or worse: the error that a comparison of equal arms can make."""
    return any(one.verdict in CALLED for one in found)
