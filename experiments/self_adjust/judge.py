"""Verdicts from what the runs left, and which explanation of a gain they speak for. The rules stood before the runs.

Families of comparisons, each with simultaneous intervals of its own: the forms against softmax; the controls against
softmax; the controls and `range, detached` against `range`; at each other position, the two arms against its softmax.
*Better* and *worse* between arms of different learning rates must hold at one rate too (experiments/equal_rate.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clearhead.compare.verdict import Comparison, Verdict
from experiments import equal_rate
from experiments.running import mean_half
from experiments.self_adjust.arms import BASELINE, DEFAULT, DETACHED, EXPLAINING, FORMS, MAIN
from experiments.self_adjust.text import FORMS_PLAN, LONG_PLAN

Found = Mapping[str, Any]


def arms_of(plan: Found) -> dict[str, Any]:
    """Arms of one comparison by name."""
    return {one["name"]: one for one in plan["arms"]}


def ledger(plan: Found) -> equal_rate.Ledger:
    """A comparison's runs, those at other arms' rates too."""
    runs = [
        equal_rate.Run(one["name"], one["rate"], int(seed), status, one["tests"].get(seed))
        for one in plan["arms"]
        for seed, status in one["status"].items()
        if status != "missing"
    ]
    runs += [equal_rate.Run(**one) for one in plan.get("again", ())]
    return equal_rate.Ledger(runs, {one["name"]: one["rate"] for one in plan["arms"]}, plan["seeds"])


def family(plan: Found, baseline: str, names: Sequence[str]) -> dict[str, Comparison]:
    """Compare those of `names` that the comparison holds with one of its arms, together."""
    arms = arms_of(plan)
    own = [name for name in names if name in arms and name != baseline]
    if baseline not in arms or not own:
        return {}
    return ledger(plan).against(baseline, own)


def families(found: Found) -> dict[str, dict[str, Comparison]]:
    """Every family of the comparisons that are there."""
    made = {}
    if FORMS_PLAN in found:
        plan = found[FORMS_PLAN]
        made["forms"] = family(plan, BASELINE, list(FORMS))
        made["controls"] = family(plan, BASELINE, list(EXPLAINING))
        made["against range"] = family(plan, DEFAULT, [*EXPLAINING, DETACHED])
    for name, plan in found.items():
        if name != FORMS_PLAN:
            made[name] = family(plan, BASELINE, [one["name"] for one in plan["arms"]])
    return made


def wanted(found: Found) -> list[tuple[str, float]]:
    """Of the comparisons in `found`, the arms and rates that a verdict waits for."""
    return equal_rate.wanted(one for family in families(found).values() for one in family.values())


def carried(against_softmax: Comparison, against_range: Comparison) -> str:
    """How much of the gain of `range` a control shows: the whole rule."""
    gains = against_softmax.verdict is Verdict.BETTER
    if gains:
        return {
            Verdict.BETTER: "carries more than the whole gain",
            Verdict.NO_DIFFERENCE: "carries the whole gain, as far as can be seen",
            Verdict.WORSE: "carries a part of the gain",
        }.get(against_range.verdict, "not judged")
    if against_softmax.verdict in (Verdict.DIVERGED, Verdict.CRASHED):
        return f"carries nothing: it {against_softmax.verdict}"
    if against_softmax.verdict is Verdict.NOT_JUDGED:
        return "not judged"
    return "carries nothing that is shown" if against_range.verdict is Verdict.WORSE else "not decided"


def said(compared: Comparison) -> str:
    """Mean difference, interval and verdict; where none is shown, what would have been seen 80 % of the time."""
    if compared.mean is None:
        return str(compared.verdict)
    found = compared.interval
    interval = "" if found is None else f" [{found.low:+.4f}, {found.high:+.4f}]"
    return f"{compared.mean:+.4f}{interval}, {verdict(compared)}"


def verdict(compared: Comparison) -> str:
    """The verdict; where no difference is shown, with what would have been seen 80 % of the time."""
    if compared.equal_rate is not None:
        return equal_rate.words(str(compared.verdict), compared.equal_rate)
    if compared.verdict is Verdict.NO_DIFFERENCE and compared.detectable is not None:
        return f"no difference shown (80 % power: {compared.detectable:.4f})"
    return str(compared.verdict)


def over_positions(found: Found) -> list[dict[str, Any]]:
    """Mean over positions, seed by seed, of each arm less its position's softmax, with Student's 95 % interval."""
    plans = {MAIN if name == FORMS_PLAN else name: plan for name, plan in found.items() if name != LONG_PLAN}
    rows = []
    for name in (DEFAULT, DETACHED):
        each, own_rates = [], False
        for plan in plans.values():
            arms = arms_of(plan)
            if name in arms:
                base, own = arms[BASELINE]["tests"], arms[name]["tests"]
                each.append({seed: own[seed] - base[seed] for seed in base if seed in own})
                own_rates |= arms[name]["rate"] != arms[BASELINE]["rate"]
        seeds = sorted(set.intersection(*(set(one) for one in each))) if each else []
        if seeds:
            means = [sum(one[seed] for one in each) / len(each) for seed in seeds]
            mean, half = mean_half(means)
            about = {"arm": name, "positions": list(plans), "seeds": len(seeds), "own_rates": own_rates}
            rows.append(about | {"mean": mean, "half": half})
    return rows


def changes(plan: Found, name: str) -> list[dict[str, Any]]:
    """The arm's validation less softmax's at each evaluation: mean and half an interval over seeds."""
    arms = arms_of(plan)
    base, own = arms[BASELINE], arms[name]
    seeds = [seed for seed in base["bits"] if base["tests"].get(seed) is not None and seed in own["tests"]]
    rows = []
    for index, tokens in enumerate(base["tokens"]):
        paired = [own["bits"][seed][index] - base["bits"][seed][index] for seed in seeds]
        if paired:
            mean, half = mean_half(paired)
            rows.append({"tokens": tokens, "mean": mean, "half": half})
    return rows


def start(found: Found, made: Mapping[str, Mapping[str, Comparison]]) -> str:
    """Whether the gain of `range` was a faster start: its verdict after four times the steps."""
    if FORMS_PLAN not in found or LONG_PLAN not in found:
        return "A faster start: not decided, the longer runs are missing."
    short, long = made["forms"].get(DEFAULT), made[LONG_PLAN].get(DEFAULT)
    if short is None or long is None or short.mean is None or long.mean is None:
        return "A faster start: not judged."
    steps = found[LONG_PLAN]["steps"] / found[FORMS_PLAN]["steps"]
    said = f"{short.mean:+.4f} bits per byte, after {steps:g} times the steps {long.mean:+.4f}"
    if short.verdict is not Verdict.BETTER:
        return f"A faster start: no gain was shown to begin with ({said})."
    if long.verdict is Verdict.BETTER:
        smaller = abs(long.mean) < abs(short.mean)
        how = "smaller, so a faster start is a part of it" if smaller else "no smaller, so a faster start is not it"
        return f"A faster start: the gain is still there and {how} ({said})."
    return f"A faster start: after {steps:g} times the steps no gain is shown any more ({said}), as it predicts."


def explanations(found: Found) -> list[str]:
    """A sentence for each explanation, by the rules above."""
    made = families(found)
    if not made.get("controls") or not made["against range"]:
        return []
    gain = made["forms"][DEFAULT]
    lines = [] if gain.verdict is Verdict.BETTER else [f"No gain of {DEFAULT} is shown to explain: {said(gain)}."]
    for name in EXPLAINING:
        if name in made["controls"]:
            both = made["controls"][name], made["against range"][name]
            less = f"less softmax {said(both[0])}; less {DEFAULT} {said(both[1])}"
            lines.append(f"{name[0].upper()}{name[1:]}: {carried(*both)} ({less}).")
    if DETACHED in made["against range"]:
        lines.append(
            f"Same function, gradient alive: {DETACHED} less {DEFAULT} {said(made['against range'][DETACHED])}."
        )
    return [*lines, start(found, made)]
