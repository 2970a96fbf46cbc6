"""A report as rows of depth and columns of quantities: what the terminal's table and the page both show. No torch.

A row is a sub-layer, or one of the four places that belong to a whole stack (embedding, output, behind the final norm,
logits). A quantity is read from one place of a row, from the prediction and from the measurement alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import attrgetter

from clearhead.signal.findings import Report
from clearhead.signal.trace import AttentionStats, Tap, Trace

SHOWN_LAYERS = 24
"""Above so many layers a short table leaves some out."""


@dataclass(frozen=True)
class Quantity:
    """A column."""

    key: str
    title: str
    group: str
    """stream | gradient | attention | parameters."""
    place: str
    """Of a sub-layer; see `clearhead.signal.trace.PLACES`."""
    read: Callable[[Tap], float | None]
    meaning: str = ""
    """One sentence for the glossary; empty for a plain variant of another quantity."""
    part: str | None = None
    """Only on sub-layers of this part."""


def _at(path: str) -> Callable[[Tap], float | None]:
    """Read `forward.variance` and the like; None where the tap lacks it."""
    owner, _, name = path.rpartition(".")
    get = attrgetter(name)

    def read(tap: Tap) -> float | None:
        found = getattr(tap, owner) if owner else tap
        return None if found is None else get(found)

    return read


def _correlation(side: str, name: str = "correlation") -> Callable[[Tap], float | None]:
    """Read a correlation; undefined where the variance is not finite, which the moments themselves call 0."""
    variance, correlation = _at(f"{side}.variance"), _at(f"{side}.{name}")

    def read(tap: Tap) -> float | None:
        spread = variance(tap)
        return correlation(tap) if spread is None or math.isfinite(spread) else math.nan

    return read


def _statistic(formula: Callable[[AttentionStats], float | None]) -> Callable[[Tap], float | None]:
    return lambda tap: None if tap.attention is None else formula(tap.attention)


def _divided(a: float, b: float) -> float:
    return a / b if b else math.nan


QUANTITIES = (
    Quantity("stream_variance", "stream variance", "stream", "input", _at("forward.variance"),
        "How far the numbers that all layers share (the residual stream) spread about their mean, at the entrance of "
        "the layer. It should neither grow nor shrink by orders of magnitude with depth."),
    Quantity("stream_mean", "stream mean", "stream", "input", _at("forward.mean"),
        "The mean of those numbers."),
    Quantity("correlation", "token correlation", "stream", "input", _correlation("forward"),
        "How alike two tokens of a sequence are after the mean is taken away: 0 means unrelated, 1 means copies of one "
        "another."),
    Quantity("raw_correlation", "raw token correlation", "stream", "input", _correlation("forward", "raw_correlation"),
        "The same with the mean left in; it is what a following matrix sees."),
    Quantity("stream_rank", "effective rank of the stream", "stream", "input", _at("effective_rank"),
        "How many directions the tokens of a sequence really use; 1 means that all tokens are copies of one another. "
        "Measured only."),
    Quantity("normed_variance", "variance behind the norm", "stream", "normed", _at("forward.variance"),
        "What a norm before the branch hands to it."),
    Quantity("branch_variance", "branch variance", "stream", "branch", _at("forward.variance"),
        "How far the numbers spread that attention or feed-forward adds to the stream, before dropout and any scale."),
    Quantity("branch_share", "share of the branch", "stream", "branch", _at("share"),
        "Which part of the sum's variance the branch brings. Large shares in many layers amplify every change of the "
        "weights; tiny ones leave the layer silent."),
    Quantity("branch_correlation", "token correlation of the branch", "stream", "branch", _correlation("forward")),
    Quantity("sum_variance", "variance of the sum", "stream", "sum", _at("forward.variance"),
        "Stream plus branch, where a norm after the branch reads it."),
    Quantity("gradient_variance", "gradient variance", "gradient", "input", _at("backward.variance"),
        "How strong the correction is that training sends back to the entrance of the layer. The first layers should "
        "get about as much as the last."),
    Quantity("gradient_correlation", "token correlation of the gradient", "gradient", "input",
        _correlation("backward"), "How alike the corrections of two tokens are."),
    Quantity("branch_gradient_variance", "gradient variance at the branch", "gradient", "branch",
        _at("backward.variance"), "The correction as it enters attention or feed-forward from behind."),
    Quantity("sum_gradient_variance", "gradient variance at the sum", "gradient", "sum", _at("backward.variance")),
    Quantity("score_deviation", "score spread", "attention", "branch",
        _statistic(lambda a: math.sqrt(a.score_variance) if a.score_variance >= 0 else math.nan),
        "Standard deviation of the attention scores that one query gives to the tokens it sees. Far below 1 attention "
        "is an even average; above about 4 it picks single tokens."),
    Quantity("entropy_share", "entropy share", "attention", "branch",
        _statistic(lambda a: _divided(a.entropy, a.uniform_entropy)),
        "How evenly attention is spread, as a share of a perfectly even spread: 100 % means all tokens alike, 0 % a "
        "single token."),
    Quantity("entropy", "entropy in nats", "attention", "branch", _statistic(lambda a: a.entropy)),
    Quantity("largest_weight", "largest weight", "attention", "branch", _statistic(lambda a: a.largest_weight),
        "The share of attention that the favourite token gets."),
    Quantity("effective_keys", "effective keys", "attention", "branch",
        _statistic(lambda a: _divided(1.0, a.participation)),
        "How many tokens attention really looks at: 1 / sum of the squared weights."),
    Quantity("jacobian_gain", "softmax gain", "attention", "branch", _statistic(lambda a: a.jacobian_gain),
        "How much a change of the scores changes the weights: ||diag(a) - a a'||², at most 1/4. Near 0, softmax is "
        "saturated (or spread over very many tokens) and hands on no correction."),
    Quantity("attention_rank", "effective rank of attention", "attention", "branch",
        _statistic(lambda a: a.effective_rank),
        "How many different patterns the rows of the attention matrix have; 1 means that every token looks at the same "
        "mixture."),
    Quantity("parameter_gradient", "gradient norm of the weights", "parameters", "branch", _at("parameter_gradient"),
        "Length of the correction for all matrices of the branch; layers with almost none do not learn."),
)  # fmt: skip
"""Every column except the matrices'."""

BY_KEY = {quantity.key: quantity for quantity in QUANTITIES}
STACK_PLACES = {"embedding": "embedding", "output": "output", "normed": "behind the final norm", "logits": "logits"}
"""Places of a whole stack, in the order of the computation, and their names as parts."""


@dataclass(frozen=True)
class Row:
    """One place of depth."""

    stack: str
    layer: int | None
    part: str
    x: float | None = None
    """Place on the axis of depth: layer 3 of two sub-layers holds 3.0 and 3.5; None = not on it."""
    taps: Mapping[str, Mapping[str, Tap]] = field(default_factory=dict)
    """Source (predicted, measured) -> place -> tap."""

    def value(self, quantity: Quantity, source: str) -> float | None:
        """Return the quantity, None where this row or this source does not have it."""
        if quantity.part not in (None, self.part):
            return None
        tap = self.taps.get(source, {}).get(quantity.place)
        return None if tap is None else quantity.read(tap)


def stacks_of(report: Report) -> list[str]:
    """Return the stacks in the order of the computation."""
    return list(dict.fromkeys(tap.stack for trace in traces_of(report).values() for tap in trace))


def traces_of(report: Report) -> dict[str, Trace]:
    """Return the traces by source; a report without measurement has only the prediction."""
    return {"predicted": report.predicted} | ({} if report.measured is None else {"measured": report.measured})


def rows_of(traces: Mapping[str, Trace], stack: str) -> list[Row]:
    """Return the rows of a stack in the order of the computation, both sources side by side."""
    found: dict[tuple[int | None, str], Row] = {}
    for source, trace in traces.items():
        for tap in trace:
            if tap.stack != stack:
                continue
            whole = tap.layer is None
            part = STACK_PLACES.get(tap.place, tap.place) if whole else tap.part
            row = found.setdefault((tap.layer, part), Row(stack, tap.layer, part, taps={}))
            places = {**row.taps.get(source, {}), "input" if whole else tap.place: tap}
            found[tap.layer, part] = replace(row, taps={**row.taps, source: places})
    inside: dict[int, list[Row]] = {}
    for row in found.values():
        if row.layer is not None:
            inside.setdefault(row.layer, []).append(row)
    ends = {part: found[None, part] for part in STACK_PLACES.values() if (None, part) in found}
    if "output" in ends:
        ends["output"] = replace(ends["output"], x=float(max(inside, default=-1) + 1))
    rows = [ends[part] for part in ("embedding",) if part in ends]
    for layer in sorted(inside):
        count = len(inside[layer])
        rows += [replace(row, x=layer + place / count) for place, row in enumerate(inside[layer])]
    return rows + [row for part, row in ends.items() if part != "embedding"]


def matrices_of(rows: Iterable[Row]) -> list[tuple[str, str]]:
    """Return (part, matrix) of every matrix whose gradient is known, in the order of the computation."""
    found: dict[tuple[str, str], None] = {}
    for row in rows:
        for places in row.taps.values():
            for name in places["branch"].matrix_gradients if "branch" in places else ():
                found[row.part, name] = None
    parts = list(dict.fromkeys(part for part, _ in found))
    return sorted(found, key=lambda pair: parts.index(pair[0]))


def matrix(name: str, part: str | None = None) -> Quantity:
    """Return the column of one matrix's gradient norm."""
    return Quantity(
        f"matrix.{name}", f"gradient norm of {name}", "parameters", "branch",
        lambda tap: tap.matrix_gradients.get(name), part=part,
    )  # fmt: skip


def layer_rows(rows: list[Row]) -> dict[int, list[Row]]:
    """Return the sub-layers by layer."""
    by_layer: dict[int, list[Row]] = {}
    for row in rows:
        if row.layer is not None:
            by_layer.setdefault(row.layer, []).append(row)
    return by_layer


def of_layer(rows: list[Row], quantity: Quantity, source: str) -> float | None:
    """Return a layer's value for a short table: that of its first sub-layer that has one."""
    return next((value for row in rows if (value := row.value(quantity, source)) is not None), None)


def shown_layers(layers: list[int], pointed: Iterable[int], limit: int = SHOWN_LAYERS) -> tuple[list[int], int]:
    """Return the layers of a short table and its step: every k-th, the last, and those that a finding points at."""
    step = max(1, math.ceil(len(layers) / limit))
    kept = set(layers[::step]) | set(layers[-1:]) | (set(pointed) & set(layers))
    return sorted(kept), step


def thinned(step: int, layers: int, rest: str) -> str:
    """Say which layers a short table shows, or nothing where it shows all."""
    if step == 1:
        return ""
    ordinal = f"{step}{'th' if 10 < step % 100 < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(step % 10, 'th')}"
    return f"Every {ordinal} of {layers} layers, the last, and those that a finding points at; {rest} has them all."


@dataclass(frozen=True)
class Change:
    """One number of the theory before and after an advice."""

    stack: str
    key: str
    title: str
    before: float
    after: float


def changes(report: Report, after: Trace) -> list[Change]:
    """Return what the theory says before and after an advice, for each stack: the numbers that findings are about."""
    found = []
    for stack in stacks_of(report):
        old, new = (rows_of({"predicted": trace}, stack) for trace in (report.predicted, after))
        for key, title, summary in SUMMARIES:
            now, then = summary(old), summary(new)
            if now is not None and then is not None:
                found.append(Change(stack, key, title, now, then))
    return found


def _values(rows: list[Row], key: str) -> list[float]:
    found = (row.value(BY_KEY[key], "predicted") for row in rows if row.x is not None)
    return [value for value in found if value is not None]


def _largest(key: str) -> Callable[[list[Row]], float | None]:
    def read(rows: list[Row]) -> float | None:
        values = _values(rows, key)
        return next((v for v in values if math.isnan(v)), max(values)) if values else None

    return read


def _last(key: str) -> Callable[[list[Row]], float | None]:
    def read(rows: list[Row]) -> float | None:
        values = _values(rows, key)
        return values[-1] if values else None

    return read


def _sum(key: str) -> Callable[[list[Row]], float | None]:
    def read(rows: list[Row]) -> float | None:
        values = _values(rows, key)
        return sum(values) if values else None

    return read


def _first_by_last(key: str) -> Callable[[list[Row]], float | None]:
    """Behind the first branch, as the verdicts have it: a norm that divides a small embedding is no fault of depth."""

    def read(rows: list[Row]) -> float | None:
        values = _values(rows, key)
        return _divided(values[1], values[-1]) if len(values) > 1 else None

    return read


SUMMARIES: tuple[tuple[str, str, Callable[[list[Row]], float | None]], ...] = (
    ("stream_variance", "largest stream variance", _largest("stream_variance")),
    ("correlation", "token correlation at the output", _last("correlation")),
    ("branch_share", "sum of the branches' shares", _sum("branch_share")),
    ("gradient_variance", "gradient variance, behind the first branch / output", _first_by_last("gradient_variance")),
    ("score_deviation", "largest score spread", _largest("score_deviation")),
)
"""Key, title and formula of what an advice changes."""
