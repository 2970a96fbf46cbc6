"""Claims, each judged for itself: confirmed, refuted, or cannot be told at this size.

A claim is about a quantity of two arms, paired over seeds: *less* (or *more*) of it by at least a margin. It is
confirmed where the whole interval of the difference lies beyond the margin, refuted where none of it does, and cannot
be told where the margin lies within. Intervals are Student's, simultaneous over the claims of a part (Bonferroni). An
arm with a run that diverged confirms nothing.

Arms that chose different learning rates differ by these too. *Confirmed* must then also hold with the other arm at the
rate of the first, *refuted* with the first at the rate of the other (experiments/equal_rate.py); until those runs are
there a claim is not judged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from clearhead.compare.statistics import detectable_effect, is_constant, paired_differences, student_interval
from clearhead.compare.verdict import EqualRate
from experiments import equal_rate

Run = Mapping[str, Any]
CONFIRMED, REFUTED, UNTOLD = "confirmed", "refuted", "cannot be told at this size"
WAITS = "not judged yet"
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Claim:
    """What is claimed of `arm` against `other`: `quantity` is lower, or `higher`, by more than `margin`."""

    text: str
    arm: str
    other: str
    quantity: str
    value: Callable[[Run], float]
    setting: str = ""
    higher: bool = False
    margin: float = 0.0
    unit: str = ""
    ratio: bool = False
    """The value is a logarithm, and is said as a ratio."""


def judge(claims: Sequence[Claim], runs: Sequence[Run], again: Sequence[Run] = ()) -> list[dict[str, Any]]:
    """Every claim with its verdict and the numbers behind it, as plain values.

    runs: at the rates that were chosen. again: of the same seeds at others, for claims that must hold at one rate.
    """
    return [_judge(claim, runs, again, len(claims)) for claim in claims]


def wanted(judged: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, float]]:
    """Arm, setting and rate of the runs that claims wait for or rest on; each once."""
    checks = [(one["about"], one["equal_rate"]) for one in judged if one.get("equal_rate")]
    return list(dict.fromkeys((check["anew"], about["setting"], check["rate"]) for about, check in checks))


def exact(text: str, holds: bool, why: str) -> dict[str, Any]:
    """A claim that arithmetic decides."""
    return {"text": text, "verdict": CONFIRMED if holds else REFUTED, "why": why}


def _judge(claim: Claim, runs: Sequence[Run], again: Sequence[Run], comparisons: int) -> dict[str, Any]:
    own, its = (_by_seed(claim, runs, name) for name in (claim.arm, claim.other))
    seeds, d = paired_differences(own, its)
    asked = {run["seed"] for run in runs if run["setting"] == claim.setting}
    failed = sum(
        run["status"] != "finished" for run in runs if _is(claim, run, claim.arm) or _is(claim, run, claim.other)
    )
    interval = student_interval(d, comparisons=comparisons)
    about = {key: value for key, value in asdict(claim).items() if key not in ("value", "text", "ratio")}
    found: dict[str, Any] = {"text": claim.text, "about": about, "seeds": len(seeds), "failed": failed}
    if interval is None:
        why = "too few pairs of runs for an interval"
        if len(d) > 1:
            level = sum(own[seed] for seed in seeds) / len(seeds)
            why = f"{claim.quantity} differs by {d.mean():.3g} at every seed (mean {level:.3g}): no spread, no interval"
        return found | {"verdict": UNTOLD, "why": why}
    sign = 1.0 if claim.higher else -1.0
    low, high = sorted((sign * interval.low, sign * interval.high))
    if low > claim.margin and not failed:
        verdict = CONFIRMED
    elif high < claim.margin:
        verdict = REFUTED
    else:
        verdict = UNTOLD
    effect = None
    if not is_constant(d):
        effect = detectable_effect(float(d.std(ddof=1)), len(d), comparisons=comparisons, sd_df=len(d) - 1)
    check = None if verdict == UNTOLD else _at_one_rate(claim, runs, again, comparisons)
    if check is not None and not check.holds:
        verdict = WAITS if check.missing else UNTOLD
    found |= {
        "verdict": verdict,
        "equal_rate": equal_rate.plain(check),
        "mean": float(d.mean()),
        "interval": [interval.low, interval.high],
        "confidence": interval.confidence,
        "detectable": effect,
        "differences": [float(x) for x in d],
    }
    return found | {"why": _why(claim, found, len(asked))}


def _at_one_rate(claim: Claim, runs: Sequence[Run], again: Sequence[Run], comparisons: int) -> EqualRate | None:
    """Hold a claim at one rate, by the rule of `clearhead compare`; None where both arms have the same one.

    There lower is better: the quantity is turned, and the other arm's moved by the margin.
    """
    of_claim = [run for run in runs if run["setting"] == claim.setting]
    chosen = {run["arm"]: run.get("rate") for run in of_claim}
    sign = -1.0 if claim.higher else 1.0

    def value(run: Run) -> float:
        return sign * claim.value(run) - (claim.margin if run["arm"] == claim.other else 0.0)

    ledger = equal_rate.Ledger(
        [
            equal_rate.Run(
                run["arm"], run.get("rate"), run["seed"], run["status"],
                value(run) if run["status"] == "finished" else None,
            )
            for run in [*of_claim, *(run for run in again if run["setting"] == claim.setting)]
            if run["arm"] in (claim.arm, claim.other)
        ],
        chosen,
        sorted({run["seed"] for run in of_claim}),
    )  # fmt: skip
    (found,) = ledger.pairs([(claim.arm, claim.other)], confidence=1.0 - 0.05 / comparisons)
    check = found.equal_rate
    if check is None or check.mean is None:
        return check
    mean, interval = sign * (check.mean - claim.margin), check.interval
    if interval is not None:
        low, high = sorted(sign * (end - claim.margin) for end in (interval.low, interval.high))
        interval = replace(interval, low=low, high=high)
    return replace(
        check, mean=mean, interval=interval, differences=[sign * (d - claim.margin) for d in check.differences]
    )


def _is(claim: Claim, run: Run, arm: str) -> bool:
    return bool(run["arm"] == arm and run["setting"] == claim.setting)


def _by_seed(claim: Claim, runs: Sequence[Run], arm: str) -> dict[int, float]:
    return {run["seed"]: claim.value(run) for run in runs if _is(claim, run, arm) and run["status"] == "finished"}


def _why(claim: Claim, found: Mapping[str, Any], seeds: int) -> str:
    low, high = found["interval"]
    if claim.ratio:
        words = (
            f"{claim.quantity} {math.exp(found['mean']):.3g} times that of {claim.other} "
            f"[{math.exp(low):.3g}, {math.exp(high):.3g}]"
        )
        if claim.margin:
            words += f", claimed {'at least' if claim.higher else 'at most'} " + (
                f"{math.exp(claim.margin if claim.higher else -claim.margin):.3g} times"
            )
        seen = None if found["detectable"] is None else f"a factor of {math.exp(found['detectable']):.3g}"
    else:
        unit = f" {claim.unit}" if claim.unit else ""
        words = (
            f"{claim.quantity} {_signed(found['mean'])}{unit} against {claim.other} [{_signed(low)}, {_signed(high)}]"
        )
        seen = None if found["detectable"] is None else f"{found['detectable']:.3g}{unit}"
    check = found["equal_rate"]
    if check is not None and check["missing"]:
        words += (
            f"; {check['missing']} runs of {check['anew']} at the learning rate {check['rate']:g} are still to show it"
        )
    elif check is not None:
        words += f"; {'holds' if check['holds'] else 'not so'} at one learning rate, with {_at(claim, check)}"
    elif found["verdict"] == UNTOLD and seen is not None:
        words += f"; {found['seeds']} seeds would have seen {seen} with 80 % power"
    if found["failed"]:
        words += f"; {found['failed']} runs diverged"
    if found["seeds"] < seeds:
        words += f"; {found['seeds']} of {seeds} seeds"
    return words


def _at(claim: Claim, check: Mapping[str, Any]) -> str:
    where = f"{check['anew']} at {check['rate']:g} too"
    if check["mean"] is None:
        return f"{where}: no pair finished"
    form = (lambda value: f"{math.exp(value):.3g}") if claim.ratio else _signed
    text, interval = f"{where}: {form(check['mean'])}{' times' if claim.ratio else ''}", check["interval"]
    return text if interval is None else f"{text} [{form(interval['low'])}, {form(interval['high'])}]"


def _signed(value: float) -> str:
    return f"{0.0 if abs(value) < 1e-12 else value:+.4g}".replace("-", MINUS)  # what a sum's rounding leaves is 0


def lines(judged: Sequence[Mapping[str, Any]]) -> list[str]:
    """A table."""
    rows = [f"| {one['text']} | **{one['verdict']}** | {one['why']} |" for one in judged]
    return ["| claim | verdict | why |", "|---|---|---|", *rows]
