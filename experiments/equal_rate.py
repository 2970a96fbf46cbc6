"""Verdicts between arms that chose different learning rates, by the rule of `clearhead compare` (docs/comparing.md).

Tuning on a few seeds tells near rates apart by luck, and every seed of the verdict shares that luck. So *better* and
*worse* must hold at one rate too: for an arm called better the baseline is trained at the arm's rate, for one called
worse the arm at the baseline's. An experiment judges what it has with `Ledger.against`, trains what `wanted` names and
judges again; the direction comes from the runs at the chosen rates, so once is enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import Record, load_record
from clearhead.compare.verdict import Comparison, EqualRate, Outcomes, Rates, Status, Verdict, compare_outcomes


@dataclass(frozen=True)
class Run:
    """One run and what it is judged by, lower is better; None where there is no value."""

    arm: str
    rate: float | None
    seed: int
    status: str
    value: float | None


@dataclass(frozen=True)
class Ledger:
    """The runs of an experiment, at the chosen rates and at others, and the rates that the arms chose.

    A seed without a run is one that is still to be done. Runs of other seeds are left out.
    """

    runs: Sequence[Run]
    chosen: Mapping[str, float | None]
    seeds: Sequence[int]

    def outcomes(self, arm: str, rate: float | None = None) -> Outcomes:
        """What became of the runs of `arm` at `rate`; None = at the one it chose."""
        rate = self.chosen[arm] if rate is None else rate
        status, values = dict.fromkeys(self.seeds, Status.MISSING), {}
        for run in self.runs:
            if run.arm != arm or run.rate != rate or run.seed not in status:
                continue
            status[run.seed] = Status(run.status)
            if run.status == Status.FINISHED:
                if run.value is None or not math.isfinite(run.value):
                    status[run.seed] = Status.DIVERGED
                else:
                    values[run.seed] = float(run.value)
        return Outcomes(arm, status, values)

    def rates(self, arm: str, baseline: str) -> Rates | None:
        """The runs that hold a verdict of these two in check; None where both chose the same rate."""
        own, its = self.chosen[arm], self.chosen[baseline]
        if own is None or its is None or own == its:
            return None
        return Rates(own, its, baseline_at_own=self.outcomes(baseline, own), arm_at_baselines=self.outcomes(arm, its))

    def against(self, baseline: str, names: Sequence[str], **options: Any) -> dict[str, Comparison]:
        """Compare the arms called `names` with `baseline`, together; options as `compare_outcomes` takes them."""
        rates = {name: found for name in names if (found := self.rates(name, baseline)) is not None}
        made = compare_outcomes(
            self.outcomes(baseline),
            [self.outcomes(name) for name in names],
            rates=rates,
            resamples=0,  # nobody shows the bootstrap
            **options,
        )
        return dict(zip(names, made, strict=True))

    def pairs(self, pairs: Sequence[tuple[str, str]], *, confidence: float = 0.95) -> list[Comparison]:
        """Compare each first with its second; all intervals hold together (Bonferroni)."""
        level = 1.0 - (1.0 - confidence) / max(1, len(pairs))
        return [self.against(other, [one], confidence=level)[one] for one, other in pairs]


def wanted(comparisons: Iterable[Comparison]) -> list[tuple[str, float]]:
    """The arms, and the rates, that verdicts wait for or rest on; each pair once."""
    checks = [found.equal_rate for found in comparisons if found.equal_rate is not None]
    return list(dict.fromkeys((check.anew, check.rate) for check in checks))


def words(verdict: str, check: Mapping[str, Any] | EqualRate | None, digits: int = 4) -> str:
    """A verdict for a table, with the reason where the runs at one rate took it away or are not there."""
    if check is None:
        return verdict
    known = asdict(check) if isinstance(check, EqualRate) else check
    if known["missing"]:
        return f"{verdict} yet: {known['missing']} runs of {known['anew']} at the learning rate {known['rate']:g} wait"
    if known["holds"]:
        return verdict
    return f"{verdict} but that of their learning rates ({at_one_rate(known, digits)})"


def at_one_rate(check: Mapping[str, Any], digits: int = 4) -> str:
    """How the two stand at one rate."""
    if check["mean"] is None:
        return f"{check['anew']} at {check['rate']:g} too: no pair finished"
    text = f"{check['anew']} at {check['rate']:g} too: {check['mean']:+.{digits}f}"
    found = check["interval"]
    return text if found is None else f"{text} [{found['low']:+.{digits}f}, {found['high']:+.{digits}f}]"


def plain(check: EqualRate | None) -> dict[str, Any] | None:
    """The check as JSON takes it."""
    return None if check is None else asdict(check)


def taken_away(found: Comparison) -> bool:
    """Whether the arms differ at the rates that each chose, and at one rate no more."""
    return found.verdict is Verdict.NO_DIFFERENCE and found.equal_rate is not None


# ---- in the folder of a `clearhead compare` ----


def further_records(
    plan: ComparePlan, folder: Path, chosen: Mapping[str, float | None]
) -> Iterator[tuple[float, Record]]:
    """The runs that the folder holds of an arm at a rate that another one chose, whoever asked for them."""
    layout = Layout(folder)
    rates = sorted({rate for rate in chosen.values() if rate is not None})
    for arm in plan.arms:
        for rate in rates:
            for seed in plan.seeds if rate != chosen[arm.name] else ():
                record = load_record(layout.equal_rate_run(arm, rate, seed), arm.name, seed)
                if record.status is not Status.MISSING:
                    yield rate, record


def train_in_folder(plan: ComparePlan, folder: Path, pairs: Sequence[tuple[str, float]]) -> None:
    """Train these arms at these rates beside the comparison's own runs, each seed that is not there yet.

    `clearhead compare` holds each arm against its baseline alone; a pair of two other arms waits for runs of its own.
    """
    from clearhead.compare import run as carried_out

    if not pairs:
        return
    layout = Layout(folder)
    resolved = json.loads(layout.resolved.read_text(encoding="utf-8"))
    tasks = [
        carried_out.task(plan, name, seed, layout.equal_rate_run(plan.arm(name), rate, seed), resolved, rate)
        for name, rate in pairs
        for seed in plan.seeds
    ]
    with carried_out.hold(layout), carried_out.session(layout, plan):
        carried_out.run_missing("checking verdicts at one learning rate", tasks, plan, show=True)
