"""The learning-rate grid: every arm gets the same rates, and validation alone chooses.

The tuning runs have their own seeds, so no run that chose a rate is also judged at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clearhead.compare.arms import Arm
from clearhead.compare.layout import Layout
from clearhead.compare.plan import TUNING_SEED, ComparePlan
from clearhead.compare.records import load_record
from clearhead.compare.verdict import Status


def tuning_seeds(plan: ComparePlan) -> range:
    """Return the seeds of the tuning runs."""
    return range(TUNING_SEED, TUNING_SEED + plan.tuning_seeds)


def rates_of(plan: ComparePlan, layout: Layout, arm: Arm) -> list[dict[str, Any]]:
    """Return, for each rate of the grid, the mean validation bits per byte of its runs and how many failed.

    A rate with a failed run has no value to choose by: a rate that sometimes diverges is not a usable rate.
    """
    rows = []
    for rate in plan.learning_rates:
        runs = [load_record(layout.tuning_run(arm, rate, seed), arm.name, seed) for seed in tuning_seeds(plan)]
        values = [run.val for run in runs if run.status is Status.FINISHED and run.val is not None]
        failed = sum(run.status in (Status.DIVERGED, Status.CRASHED) for run in runs)
        missing = sum(run.status is Status.MISSING for run in runs)
        usable = bool(values) and not failed and not missing
        rows.append(
            {
                "rate": rate,
                "val": float(np.mean(values)) if usable else None,
                "values": values,
                "failed": failed,
                "missing": missing,
            }
        )
    return rows


def choose(plan: ComparePlan, layout: Layout, arm: Arm) -> float | None:
    """Return the rate with the lowest validation bits per byte; the smallest rate when every one failed.

    None while tuning runs are missing, and without a grid.
    """
    rows = rates_of(plan, layout, arm)
    return None if not rows or any(row["missing"] for row in rows) else best(rows)


def best(rows: Sequence[Mapping[str, Any]]) -> float:
    """Return the rate that a whole grid chooses; `rows` as `rates_of` gives them."""
    usable = [row for row in rows if row["val"] is not None]
    row = min(usable, key=lambda row: row["val"]) if usable else min(rows, key=lambda row: row["rate"])
    return float(row["rate"])


def summary(plan: ComparePlan, layout: Layout) -> dict[str, Any] | None:
    """Return the whole grid for the report; None when every arm has the one declared rate."""
    if not plan.learning_rates:
        return None
    arms = []
    for arm in plan.arms:
        chosen = choose(plan, layout, arm)
        edge = chosen is not None and chosen in (min(plan.learning_rates), max(plan.learning_rates))
        arms.append({"name": arm.name, "rates": rates_of(plan, layout, arm), "chosen": chosen, "at_edge": edge})
    return {"rates": list(plan.learning_rates), "seeds": list(tuning_seeds(plan)), "arms": arms}
