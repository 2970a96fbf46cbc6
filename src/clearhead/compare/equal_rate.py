"""Where arms chose different learning rates: the runs that hold a verdict against one rate for both.

The rule is in `clearhead.compare.verdict`. A run is made only where a verdict waits for it: for an arm called better,
the baseline at the arm's rate; for an arm called worse, the arm at the baseline's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from clearhead.compare import tuning
from clearhead.compare.arms import Arm
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import load_record, outcomes
from clearhead.compare.verdict import Comparison, Outcomes, Rates


def rates(plan: ComparePlan, layout: Layout) -> dict[str, Rates]:
    """Return, by name, the candidates that chose another rate than the baseline, with their runs at the other's."""
    chosen = {arm.name: tuning.choose(plan, layout, arm) for arm in plan.arms}
    base = chosen[plan.baseline]
    found = {}
    for arm in plan.arms:
        own = chosen[arm.name]
        if base is not None and own is not None and own != base:
            found[arm.name] = Rates(
                own=own,
                baselines=base,
                baseline_at_own=_outcomes(plan, layout, plan.arm(plan.baseline), own),
                arm_at_baselines=_outcomes(plan, layout, arm, base),
            )
    return found


def wanted(plan: ComparePlan, comparisons: Iterable[Comparison]) -> list[tuple[Arm, float]]:
    """Return the arms, and the rates, that verdicts wait for or rest on; each pair once."""
    checks = [found.equal_rate for found in comparisons if found.equal_rate is not None]
    pairs = dict.fromkeys((check.anew, check.rate) for check in checks)
    return [(plan.arm(name), rate) for name, rate in pairs]


def missing(plan: ComparePlan, layout: Layout, comparisons: Mapping[str, Comparison]) -> list[str]:
    """Name the runs that verdicts wait for."""
    return [
        f"{arm.name} at learning rate {rate:g}, seed {seed}"
        for arm, rate in wanted(plan, comparisons.values())
        for seed in plan.seeds
        if load_record(layout.equal_rate_run(arm, rate, seed), arm.name, seed).status == "missing"
    ]


def _outcomes(plan: ComparePlan, layout: Layout, arm: Arm, rate: float) -> Outcomes:
    runs = [load_record(layout.equal_rate_run(arm, rate, seed), arm.name, seed) for seed in plan.seeds]
    return outcomes(arm.name, runs)
