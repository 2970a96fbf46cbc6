"""From two columns of numbers to one sentence: the comparison of an arm with the baseline, and its verdict.

The rules, all of them:

- The verdict follows the simultaneous interval: *better* when it lies wholly below zero, *worse* when wholly above,
  else *no difference shown at this size*, with the smallest effect that the run had 80 % power to see.
- A run that diverged or crashed is a result. The arm is then compared over the seeds where both runs finished, the
  count is stated, and the arm is never called better. An arm none of whose runs finished has that as its verdict.
- Where two arms chose their learning rates from a grid and chose differently, *better* and *worse* must also hold at
  one rate: the baseline, trained at the candidate's rate, must lose too; the candidate, trained at the baseline's, must
  not be saved by it. Tuning on a few seeds tells near rates apart by luck, and that luck is shared by every seed of the
  verdict: without this rule equal arms were called different in up to a third of comparisons (experiments/calibration).
- Where the numbers allow no judgement (fewer than two pairs, runs still missing, no spread at all) the verdict is
  *not judged* and the sentence says why.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import numpy as np

from clearhead.compare import statistics as st


class Verdict(StrEnum):
    """What may be said of an arm against the baseline."""

    BASELINE = "baseline"
    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown at this size"
    DIVERGED = "diverged"
    CRASHED = "crashed"
    NOT_JUDGED = "not judged"


class Status(StrEnum):
    """What became of one run."""

    FINISHED = "finished"
    DIVERGED = "diverged"
    CRASHED = "crashed"
    MISSING = "missing"


@dataclass(frozen=True)
class Outcomes:
    """One arm's runs: what became of each seed, and the value where it finished."""

    name: str
    status: Mapping[int, Status]
    values: Mapping[int, float]

    def seeds(self, *statuses: Status) -> list[int]:
        """Return the seeds whose run has one of `statuses`."""
        return sorted(seed for seed, status in self.status.items() if status in statuses)


@dataclass(frozen=True)
class Rates:
    """Of an arm and a baseline that chose different learning rates: either of them, trained at the other's rate."""

    own: float
    """The arm's choice."""
    baselines: float
    """The baseline's choice."""
    baseline_at_own: Outcomes
    arm_at_baselines: Outcomes


@dataclass(frozen=True)
class EqualRate:
    """How an arm stands against the baseline when both train at one learning rate."""

    rate: float
    anew: str
    """Which of the two was trained anew for this: the one that had chosen another rate."""
    missing: int
    """Of its runs, how many are still to be done."""
    seeds: list[int]
    differences: list[float]
    mean: float | None
    interval: st.Interval | None
    holds: bool
    """Whether it says the same as the comparison at the chosen rates."""


@dataclass(frozen=True)
class Comparison:
    """One arm against the baseline; None where a figure is not defined."""

    verdict: Verdict
    sentence: str
    seeds: list[int]
    differences: list[float]
    mean: float | None = None
    relative: float | None = None
    sd: float | None = None
    interval: st.Interval | None = None
    bootstrap: st.Interval | None = None
    p_value: float | None = None
    p_holm: float | None = None
    detectable: float | None = None
    detectable_relative: float | None = None
    equal_rate: EqualRate | None = None
    """None where no rate was tuned, where both chose the same one, or where nothing was to be checked."""


def compare_outcomes(
    baseline: Outcomes,
    candidates: Sequence[Outcomes],
    *,
    confidence: float = 0.95,
    power: float = 0.8,
    unit: str = "bits per byte",
    rates: Mapping[str, Rates] | None = None,
    resamples: int = st.RESAMPLES,
) -> list[Comparison]:
    """Compare every candidate with the baseline, with intervals and p values that hold for all of them together.

    `rates` holds, by name, the candidates that chose another learning rate than the baseline; `resamples` are those of
    the bootstrap, which no verdict depends on (0 = none).

    The Bonferroni divisor is the number of candidates in the plan, whether or not each produced numbers: leaving one
    out after the fact would make the others' intervals narrower than they may be.
    """
    comparisons = max(1, len(candidates))
    results = [
        _at_one_rate(
            _compare(baseline, arm, confidence, comparisons, power, resamples),
            baseline,
            arm,
            (rates or {}).get(arm.name),
            confidence=confidence,
            comparisons=comparisons,
        )
        for arm in candidates
    ]
    adjusted = st.holm([result.p_value for result in results])
    return [
        replace(
            adjusted_result := replace(result, p_holm=p),
            sentence=_sentence(adjusted_result, baseline, arm, confidence, comparisons, power, unit),
        )
        for result, p, arm in zip(results, adjusted, candidates, strict=True)
    ]


def _compare(
    baseline: Outcomes, arm: Outcomes, confidence: float, comparisons: int, power: float, resamples: int
) -> Comparison:
    seeds, d = st.paired_differences(arm.values, baseline.values)
    if not seeds:
        return Comparison(_judge(baseline, arm, d, None), "", [], [])
    mean, level = float(d.mean()), float(np.mean([baseline.values[seed] for seed in seeds]))
    spread = len(seeds) >= 2 and not st.is_constant(d)
    sd = float(d.std(ddof=1)) if len(seeds) >= 2 else None
    interval = st.student_interval(d, confidence=confidence, comparisons=comparisons)
    detectable = (
        st.detectable_effect(
            float(sd), len(seeds), alpha=1 - confidence, comparisons=comparisons, power=power, sd_df=len(seeds) - 1
        )
        if spread and sd is not None
        else None
    )
    return Comparison(
        verdict=_judge(baseline, arm, d, interval),
        sentence="",
        seeds=seeds,
        differences=[float(x) for x in d],
        mean=mean,
        relative=mean / level if level else None,
        sd=sd,
        interval=interval,
        bootstrap=st.bootstrap_interval(d, confidence=confidence, comparisons=comparisons, resamples=resamples),
        p_value=st.student_p_value(d),
        detectable=detectable,
        detectable_relative=detectable / level if detectable is not None and level else None,
    )


def _at_one_rate(
    found: Comparison, baseline: Outcomes, arm: Outcomes, rates: Rates | None, *, confidence: float, comparisons: int
) -> Comparison:
    """Let a verdict stand only if the two arms also differ, in the same direction, at one learning rate.

    An intersection of two tests, each at the interval's own level: in equal arms the one at a common rate is a plain
    comparison of equals, whatever the tuning chose, so together they are wrong no more often than it is.
    """
    if rates is None or found.verdict not in (Verdict.BETTER, Verdict.WORSE):
        return found
    better = found.verdict is Verdict.BETTER
    one, other = (rates.baseline_at_own, arm) if better else (baseline, rates.arm_at_baselines)
    anew = one if better else other
    seeds, d = st.paired_differences(other.values, one.values)
    interval = st.student_interval(d, confidence=confidence, comparisons=comparisons)
    missing = len(anew.seeds(Status.MISSING))
    failed_throughout = not anew.seeds(Status.FINISHED, Status.MISSING)  # the other's rate does not suit it at all
    same_side = interval is not None and (interval.high < 0 if better else interval.low > 0)
    check = EqualRate(
        rate=rates.own if better else rates.baselines,
        anew=anew.name,
        missing=missing,
        seeds=seeds,
        differences=[float(x) for x in d],
        mean=float(d.mean()) if seeds else None,
        interval=interval,
        holds=not missing and (same_side or failed_throughout),
    )
    verdict = Verdict.NOT_JUDGED if missing else found.verdict if check.holds else Verdict.NO_DIFFERENCE
    return replace(found, verdict=verdict, equal_rate=check)


def _judge(baseline: Outcomes, arm: Outcomes, d: np.ndarray, interval: st.Interval | None) -> Verdict:
    if arm.seeds(Status.MISSING) or baseline.seeds(Status.MISSING):
        return Verdict.NOT_JUDGED
    failed = arm.seeds(Status.DIVERGED, Status.CRASHED)
    if failed and not arm.seeds(Status.FINISHED):
        return Verdict.DIVERGED if arm.seeds(Status.DIVERGED) else Verdict.CRASHED
    if interval is None:
        identical = d.size >= 2 and not np.any(d) and not failed
        return Verdict.NO_DIFFERENCE if identical else Verdict.NOT_JUDGED
    if interval.low > 0:
        return Verdict.WORSE
    if interval.high < 0:
        return Verdict.NOT_JUDGED if failed else Verdict.BETTER
    return Verdict.NO_DIFFERENCE


def _sentence(
    c: Comparison, baseline: Outcomes, arm: Outcomes, confidence: float, comparisons: int, power: float, unit: str
) -> str:
    text = _core(c, baseline, arm, confidence, comparisons, power, unit)
    notes = [*_failures(arm), *_failures(baseline), *_pairing(c, baseline, arm)]
    notes += _keener_test(c, confidence) if c.equal_rate is None else _equal_rate_holds(c.equal_rate)
    return " ".join([text, *notes])


def _core(
    c: Comparison, baseline: Outcomes, arm: Outcomes, confidence: float, comparisons: int, power: float, unit: str
) -> str:
    a, b = arm.name, baseline.name
    if c.verdict in (Verdict.DIVERGED, Verdict.CRASHED):
        return f"{a} {c.verdict}: none of its {len(arm.status)} runs finished, so it has no value to compare with {b}."
    if arm.seeds(Status.MISSING) or baseline.seeds(Status.MISSING):
        missing = len(arm.seeds(Status.MISSING)) + len(baseline.seeds(Status.MISSING))
        return (
            f"{a} is not judged yet: {missing} of the {len(arm.status) + len(baseline.status)} runs of {a} and {b} are "
            "still missing. What stands below is interim; a decision taken on it would not have the stated error rate."
        )
    if c.mean is None:
        return f"{a} is not judged: there is no seed at which both {a} and {b} finished."
    gap = f"{abs(c.mean):.4f} {unit} ({abs(c.relative or 0.0):.2%})"
    if c.interval is None:
        if len(c.seeds) < 2:
            side = "lower" if c.mean < 0 else "higher"
            return f"{a} is not judged: one pair of runs ({gap} {side}) says nothing about the luck of the seed."
        if c.mean == 0:
            return f"{a} ended exactly equal to {b} on every seed: no difference shown, and no spread for an interval."
        return (
            f"{a} is not judged: it differs from {b} by the same {gap} at every seed, so the seeds had no effect on "
            "the difference and there is no spread for an interval."
        )
    interval = _interval_words(c.interval, confidence, comparisons)
    if c.equal_rate is not None and not c.equal_rate.holds:
        return _not_at_one_rate(c, c.equal_rate, a, b, f"{gap} {'lower' if c.mean < 0 else 'higher'}, {interval}", unit)
    if c.verdict is Verdict.BETTER:
        return f"{a} is better than {b}: {gap} lower, {interval}."
    if c.verdict is Verdict.WORSE:
        return f"{a} is worse than {b}: {gap} higher, {interval}."
    if c.verdict is Verdict.NOT_JUDGED:
        return (
            f"{a} is not judged: where both finished it was {gap} lower than {b}, {interval}, but not all of its runs "
            "finished, and an arm that fails is not called better."
        )
    side = "lower" if c.mean < 0 else "higher"
    return (
        f"No difference shown at this size between {a} and {b}: {a} is {gap} {side}, {interval}. With this spread, "
        f"known from {len(c.seeds)} seeds only, a true difference of {c.detectable:.4f} {unit} "
        f"({c.detectable_relative or 0.0:.2%}) is found {power:.0%} of the time, a smaller one less often."
    )


def _not_at_one_rate(c: Comparison, check: EqualRate, a: str, b: str, chosen: str, unit: str) -> str:
    """Say why a difference at the chosen learning rates is not called one."""
    if check.missing:
        return (
            f"{a} is not judged yet: at the learning rates that each chose it is {chosen}; the {check.missing} runs of "
            f"{check.anew} at {check.rate:g}, the other's choice, are still to show whether that holds at one rate."
        )
    words = "no two runs that both finished"
    if check.mean is not None:
        words = f"it is {abs(check.mean):.4f} {unit} {'lower' if check.mean < 0 else 'higher'}"
        if check.interval is not None:
            low, high = (
                f"{value:+.4f}".replace("-", "\N{MINUS SIGN}") for value in (check.interval.low, check.interval.high)
            )
            words += f", interval {low} to {high}"
    return (
        f"No difference shown at this size between {a} and {b} but that of their learning rates: at the rates that "
        f"each chose {a} is {chosen}; with {check.anew} trained at {check.rate:g} too, the other's choice, {words}."
    )


def _equal_rate_holds(check: EqualRate) -> list[str]:
    if not check.holds:
        return []
    if check.interval is None or check.mean is None:
        return [f"{check.anew} did not finish at {check.rate:g}, the other's learning rate."]
    side = "lower" if check.mean < 0 else "higher"
    return [f"It holds with both at the learning rate {check.rate:g}: {abs(check.mean):.4f} {side}."]


def _interval_words(interval: st.Interval, confidence: float, comparisons: int) -> str:
    kind = f"simultaneous {confidence:.0%} interval" if comparisons > 1 else f"{confidence:.0%} interval"
    return f"{kind} of the difference {interval.low:+.4f} to {interval.high:+.4f}".replace("-", "\N{MINUS SIGN}")


def _failures(arm: Outcomes) -> list[str]:
    found = []
    for status in (Status.DIVERGED, Status.CRASHED):
        seeds = arm.seeds(status)
        if seeds and arm.seeds(Status.FINISHED):
            listed = ", ".join(map(str, seeds))
            found.append(f"{len(seeds)} of the {len(arm.status)} runs of {arm.name} {status} (seed {listed}).")
    return found


def _pairing(c: Comparison, baseline: Outcomes, arm: Outcomes) -> list[str]:
    dropped = len(arm.status) - len(c.seeds)
    if not c.seeds or not dropped or arm.seeds(Status.MISSING) or baseline.seeds(Status.MISSING):
        return []
    return [f"Compared over the {len(c.seeds)} of {len(arm.status)} seeds where both finished."]


def _keener_test(c: Comparison, confidence: float) -> list[str]:
    """Name the case in which the p value and the verdict seem to disagree."""
    if c.verdict is not Verdict.NO_DIFFERENCE or c.p_holm is None or c.p_holm >= 1 - confidence:
        return []
    return [
        f"Holm's test, a little keener than the interval, gives p = {c.p_holm:.3f}: worth a new run with more seeds."
    ]
