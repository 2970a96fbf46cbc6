"""The words of an inspection: what each finding means, the verdict in one sentence, numbers as text. No torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from clearhead.signal.findings import KINDS, Finding, Report

MEANING = {
    "exploding_signal": "Each layer adds to a sum that all layers share, and here that sum grows so much that late "
    "layers hardly change it, or that numbers overflow.",
    "vanishing_gradient": "Training sends a correction back through the layers. Here it fades on the way, so the first "
    "layers hardly learn.",
    "exploding_gradient": "Training sends a correction back through the layers. Here it grows on the way, so the first "
    "layers are thrown about while the last ones barely move.",
    "update_amplification": "Even a cautious step of the optimizer moves the model's answer by far too much, so the "
    "first steps of training throw the model off.",
    "rank_collapse": "With depth the tokens come to look alike. Attention cannot tell equal tokens apart, so deep "
    "layers have nothing to work with.",
    "attention_saturation": "Almost all attention goes to a single token. Which one it is hardly responds to a "
    "correction, so the layer stays stuck with its first choice.",
    "silent_branches": "What these layers compute is too small beside what passes them by. They cost time and do "
    "little.",
    "dead_matrix": "Hardly any correction reaches this matrix, so it stays as it was drawn.",
    "not_finite": "A number has overflowed or is undefined. Everything computed from it is lost.",
    "off_theory": "The model does not behave as its description says. The prediction, and the advice that rests on it, "
    "hold only as far as the two agree.",
}
"""What each kind of finding means, for a person who does not know the theory."""

OBSERVED = {
    "exploding_signal": (
        "the residual stream grows by orders of magnitude",
        "stream grows",
        "Common in trained models: from some layer on a few features are very large, and the norms before the branches "
        "take the size out again. Keep it in mind for low precision and quantisation.",
    ),
    "vanishing_gradient": (
        "the gradient is smaller at the first layers",
        "gradient shrinks",
        "Further training with one plain rate would move the first layers least. Adam's steps do not depend on a "
        "gradient's size.",
    ),
    "exploding_gradient": (
        "the gradient is larger at the first layers",
        "gradient grows",
        "Further training with one plain rate would move the first layers most. Adam's steps do not depend on a "
        "gradient's size.",
    ),
    "update_amplification": (
        "the branches make up much of the sums that they enter",
        "shares add up",
        "A small change of all weights changes the answer by that much: a reason for small learning rates in "
        "fine-tuning.",
    ),
    "rank_collapse": (
        "the tokens share most of their state",
        "tokens alike",
        "What they share may be a constant that the head takes no notice of. Of a model that predicts well it says "
        "nothing bad.",
    ),
    "attention_saturation": (
        "some layers give most of their attention to one token",
        "one token",
        "Common in trained models: heads that find nothing to look for rest on one token, often the first. Little "
        "gradient passes through such rows.",
    ),
    "silent_branches": (
        "the last branches add little to the stream",
        "small branches",
        "Little in variance need not be little in effect: a branch may write where the others do not.",
    ),
    "dead_matrix": (
        "a matrix gets almost no gradient",
        "little gradient",
        "On this batch further training would hardly move it.",
    ),
    "off_theory": (
        "measured and predicted differ",
        "off theory",
        "The theory describes independent random weights of these sizes. These weights work together, as weights do "
        "after training.",
    ),
}
"""Kind of finding -> title, mark in a figure, and meaning, where the weights are not a random start's."""

BACKWARD = ("vanishing_gradient", "exploding_gradient")
"""Kinds that set in on the way back, and so concern the layers before."""

SEVERITIES = {
    "untrainable": "a run is not expected to learn",
    "harmful": "it learns worse than it could",
    "note": "worth knowing",
}
"""Every severity, the worst first."""

SOURCES = {
    "predicted": "by the theory",
    "measured": "measured on this model and batch",
    "both": "by the theory, and measured on this model and batch",
}


def verdict_sentence(report: Report) -> str:
    """Say in one sentence what is expected of a training run, why, and how many lines repair it."""
    worst = [finding for finding in report.findings if finding.severity == "untrainable"]
    harmful = [finding for finding in report.findings if finding.severity == "harmful"]
    if report.verdict == "untrainable":
        reasons = _listed(_distinct(f"{KINDS.get(f.kind, f.kind)}{_whereabouts(f, report)}" for f in worst))
        return f"Not expected to train{': ' if reasons else ''}{reasons}{_repair(report)}."
    if observed(report):
        return _standing(report)
    if report.verdict != "trainable":
        raise ValueError(f"verdict: expected trainable or untrainable, got {report.verdict!r}")
    if worst:
        kinds = _listed(_distinct(KINDS.get(f.kind, f.kind) for f in worst))
        return f"The theory expects it to train, but something else does not: {kinds}{_repair(report)}."
    if harmful:
        kinds = _listed(_distinct(KINDS.get(f.kind, f.kind) for f in harmful))
        return f"Expected to train, though not at its best: {kinds}{_repair(report)}."
    return "Expected to train: no fault was found."


def observed(report: Report) -> bool:
    """Whether the weights are not a random start's, so that findings are observations."""
    return report.verdict in ("trained", "no forecast")


def title(finding: Finding, report: Report) -> str:
    """Name a finding."""
    known = OBSERVED.get(finding.kind) if observed(report) else None
    return known[0] if known else KINDS.get(finding.kind, finding.kind)


def mark(finding: Finding, report: Report) -> str:
    """Name a finding in two words, for a figure."""
    known = OBSERVED.get(finding.kind) if observed(report) else None
    return known[1] if known else finding.kind.replace("_", " ")


def meaning(finding: Finding, report: Report) -> str:
    """Say what a finding means; empty for an unknown kind."""
    known = OBSERVED.get(finding.kind) if observed(report) else None
    return known[2] if known else MEANING.get(finding.kind, "")


def location(finding: Finding) -> str:
    """Say where a finding sets in."""
    return ", ".join(part for part in (finding.stack, _depth(finding)) if part)


def by_severity(findings: Sequence[Finding]) -> list[tuple[int, Finding]]:
    """Return the findings with their index, the worst first, else in the given order."""
    order = list(SEVERITIES)
    rank = {severity: place for place, severity in enumerate(order)}
    return sorted(enumerate(findings), key=lambda pair: rank.get(pair[1].severity, len(order)))


def capital(text: str) -> str:
    """Begin with a capital letter."""
    return text[:1].upper() + text[1:]


def kinds_in_words(kinds: Iterable[str]) -> str:
    """Name kinds of findings as a reader would: `vanishing gradient, rank collapse`."""
    return ", ".join(kind.replace("_", " ") for kind in kinds)


def number(value: float | str | None, absent: str = "-") -> str:
    """Print at most four significant digits, without padding: `0.9731`, `12,340`, `3.41e-5`, `inf`, `nan`."""
    if value is None:
        return absent
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.4g}"
    if 1e4 <= abs(value) < 1e6:
        return f"{value:,.0f}"
    return _exponent(f"{value:.2e}")


def brief(value: float | None) -> str:
    """Print three significant digits in at most seven characters (eight below 1e-99)."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-3 <= abs(value) < 999.5:
        return f"{value:.3g}"
    return _exponent(f"{value:.1e}")


def correlation(value: float | None) -> str:
    """Print a correlation; one that is nearly 1 by what it lacks: `1-4e-5`."""
    if value is None or not 0.9995 <= value < 1.0:
        return brief(value)
    return f"1-{_exponent(f'{1.0 - value:.0e}')}"


def share(value: float | None) -> str:
    """Print a share as a percentage: whole numbers, and a first digit where there would be none."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    return f"{value:.0%}" if value >= 0.01 or value == 0 else f"{100 * value:.1g}%" if value > 1e-4 else "~0%"


def fact(value: object) -> str:
    """Print a fact: whole numbers with separators, others with four digits, the rest as it is."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "unknown"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return number(value)
    if isinstance(value, dict):
        return "; ".join(f"{label(str(key))} {fact(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(fact(inner) for inner in value)
    return str(value)


def label(key: str) -> str:
    """Turn a key of the facts into words."""
    return key.replace("_", " ")


def _exponent(text: str) -> str:
    mantissa, exponent = text.split("e")
    return f"{mantissa.rstrip('0').rstrip('.') if '.' in mantissa else mantissa}e{int(exponent)}"


def _standing(report: Report) -> str:
    broken = ", but it holds values that are not finite" if any(f.kind == "not_finite" for f in report.findings) else ""
    if report.verdict == "no forecast":
        return f"No forecast: these weights are not a random start's; what differs is described, not judged{broken}."
    loss, chance = (number(report.facts.get(name)) for name in ("loss", "frequency_loss"))
    return (
        f"A trained model that works: its loss here is {loss} nats a token, where token frequencies alone give {chance}"
        f"{broken}."
    )


def _distinct(words: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(words))


def _listed(words: Sequence[str]) -> str:
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])}, and {words[-1]}"


def _depth(finding: Finding) -> str:
    if finding.depth is None:
        return ""
    if finding.kind in BACKWARD:
        return f"from layer {finding.depth} down"
    return f"first at layer {finding.depth}" if finding.kind == "dead_matrix" else f"from layer {finding.depth} on"


def _whereabouts(finding: Finding, report: Report) -> str:
    stacks = {tap.stack for tap in report.predicted}
    where = [f"in the {finding.stack}"] if len(stacks) > 1 else []
    where += [_depth(finding)] if finding.depth is not None else []
    return f" ({', '.join(where)})" if where else ""


def _repair(report: Report) -> str:
    wrong = {finding.kind for finding in report.findings if finding.severity != "note"}
    if any(wrong <= set(advice.cures) for advice in report.advice):
        return "; one line repairs it"
    return "; the advice repairs a part of it" if any(wrong & set(advice.cures) for advice in report.advice) else ""
