"""MADE-UP reports for tests: traces whose numbers are drawn here, not computed by the theory nor taken from a model.

They have the shape that `clearhead.signal.predict_skeleton` and `clearhead.signal.measure` give.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from clearhead.signal.findings import Advice, Finding, Report
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.trace import AttentionStats, Tap, Trace

MATRICES = {
    "attention": ("query", "key", "value", "output"),
    "cross_attention": ("query", "key", "value", "output"),
    "feed_forward": ("up", "down"),
}


def trace(
    layers: int = 4,
    *,
    source: str = "predicted",
    stacks: tuple[str, ...] = ("decoder",),
    placement: str = "pre",
    growth: float = 1.2,
    fading: float = 1.0,
    statistics: bool = True,
    gradients: bool = True,
    noise: float = 0.0,
    notes: tuple[str, ...] = (),
    facts: dict[str, Any] | None = None,
) -> Trace:
    """A trace whose stream variance grows by `growth` a layer and whose gradient fades by `fading` a layer."""
    rng = random.Random(7)

    def drawn(value: float) -> float:
        return value * math.exp(noise * rng.gauss(0.0, 1.0))

    taps = [tap for stack in stacks for tap in _stack(stack, layers, stacks, placement, growth, fading, drawn)]
    taps.append(
        Tap("logits", stacks[-1], None, "logits", "logits", Moments.of(drawn(0.9), 0.4), GradientMoments(1e-9, 0.0))
    )
    if source == "measured":
        taps = [replace(tap, effective_rank=drawn(20.0)) if tap.place == "input" else tap for tap in taps]
    if not statistics:
        taps = [replace(tap, attention=None) for tap in taps]
    if not gradients:
        taps = [replace(tap, backward=None, parameter_gradient=None, matrix_gradients={}) for tap in taps]
    return Trace(source, tuple(taps), notes, facts or {})


def _stack(
    stack: str,
    layers: int,
    stacks: tuple[str, ...],
    placement: str,
    growth: float,
    fading: float,
    drawn: Callable[[float], float],
) -> Iterator[Tap]:
    parts = ["attention", "feed_forward"]
    if stack == "decoder" and "encoder" in stacks:
        parts.insert(1, "cross_attention")

    def gradient(depth: float) -> GradientMoments:
        return GradientMoments.of(drawn(1e-6 * fading ** (layers - depth)), 0.1)

    def stream(depth: float) -> Moments:
        correlation = 1.0 - 0.9 * math.exp(-depth / 8)
        return Moments.of(drawn(growth**depth if placement == "pre" else 1.0), correlation, drawn(0.01))

    yield Tap(f"{stack}.embedding", stack, None, "embedding", "embedding", stream(0.0), gradient(0.0))
    for layer in range(layers):
        for index, part in enumerate(parts):
            depth = layer + index / len(parts)
            name = f"{stack}.{layer}.{part}"
            yield Tap(f"{name}.input", stack, layer, part, "input", stream(depth), gradient(depth))
            if placement == "pre":
                yield Tap(f"{name}.normed", stack, layer, part, "normed", Moments.of(1.0, 0.3), gradient(depth))
            norms = {matrix: drawn(0.03 * fading ** ((layers - depth) / 2)) for matrix in MATRICES[part]}
            yield Tap(
                f"{name}.branch", stack, layer, part, "branch", Moments.of(drawn(0.2), 0.5), gradient(depth),
                attention=None if part == "feed_forward" else statistics_of(drawn(0.3 + 4.0 * depth / 192)),
                share=drawn(0.1), parameter_gradient=math.sqrt(sum(norm**2 for norm in norms.values())),
                matrix_gradients=norms,
            )  # fmt: skip
            if placement == "post":
                yield Tap(f"{name}.sum", stack, layer, part, "sum", Moments.of(drawn(1.2), 0.5), gradient(depth))
    yield Tap(f"{stack}.output", stack, None, "output", "output", stream(layers), gradient(layers))
    if placement == "pre":
        yield Tap(f"{stack}.normed", stack, None, "output", "normed", Moments.of(1.0, 0.8), gradient(layers))


def statistics_of(deviation: float, keys: int = 64) -> AttentionStats:
    """Plausible statistics of attention whose scores have this standard deviation."""
    uniform = math.log(keys)
    entropy = max(0.05, uniform - deviation**2 / 2) if deviation < 2.5 else 0.05 * uniform
    participation = min(1.0, math.exp(deviation**2) / keys)
    return AttentionStats(
        score_variance=deviation**2,
        entropy=entropy,
        uniform_entropy=uniform,
        largest_weight=min(1.0, 2.5 * participation),
        participation=participation,
        jacobian_gain=participation * (1.0 - participation),
        effective_rank=12.0 / (1.0 + deviation),
    )


def finding(kind: str = "vanishing_gradient", severity: str = "untrainable", **changes: Any) -> Finding:
    values: dict[str, Any] = {
        "stack": "decoder",
        "depth": 1,
        "source": "both",
        "value": 3.2e-11,
        "threshold": 1e-6,
        "evidence": "the gradient's variance at layer 0 is 3.2e-11 of that at the output; below 1e-6 nothing learns.",
    }
    return Finding(kind, severity, **{**values, **changes})


def advice(layers: int = 4, **changes: Any) -> Advice:
    values: dict[str, Any] = {
        "title": "Initialise with DeepScaleLM",
        "cures": ("vanishing_gradient", "rank_collapse"),
        "leaves": (),
        "line": 'ch.init_(model, "deepscale")',
        "overrides": {"init": "deepscale"},
        "reason": "It scales every branch so that the stream keeps variance 1 at any depth.",
        "predicted": trace(layers, growth=1.0),
        "command": 'clearhead compare --arm "before:" "after: model.init=deepscale" --set model.layers=192',
    }
    return Advice(**{**values, **changes})


FACTS = {
    "family": "clearhead decoder",
    "norm": "post",
    "layers": 4,
    "width": 256,
    "parameters": 12_345_678,
    "tokens": 128,
    "batch": 8,
    "loss": 5.5432109,
    "data": "shakespeare",
}


def report(layers: int = 4, *, broken: bool = True, measured: bool = True, **shape: Any) -> Report:
    """A report of a model with `layers` layers; `broken`: its gradient vanishes and advice is given."""
    shape = {"fading": 0.4 if broken else 1.0, **shape}
    stacks = shape.get("stacks", ("decoder",))
    notes = ("dropout is on, as in training", "attention and effective ranks: a sample of at most 64 rows a head")
    found = trace(layers, source="measured", noise=0.08, notes=notes, facts={"seconds": 1.25, "loss": 5.5}, **shape)
    findings = (
        finding("rank_collapse", "harmful", depth=layers // 2, source="predicted", value=0.998, threshold=0.99,
            evidence="two tokens correlate to 0.998 at the output, above 0.99."),
        finding(depth=layers - 1),
        finding("off_theory", "note", depth=None, source="both", value=1.4, threshold=1.25,
            evidence="measured stream variance is 1.4 times the predicted one."),
    )  # fmt: skip
    return Report(
        title="deep-post-ln",
        predicted=trace(layers, notes=("weights are taken as independent normal numbers",), **shape),
        measured=found if measured else None,
        findings=findings if broken else (),
        advice=(advice(layers, predicted=trace(layers, growth=1.0, stacks=stacks)), _second(layers, stacks))
        if broken
        else (),
        verdict="untrainable" if broken else "trainable",
        facts={**FACTS, "layers": layers},
    )


def _second(layers: int, stacks: tuple[str, ...]) -> Advice:
    return advice(
        layers, title="Put the norm before the branch", cures=("vanishing_gradient",), leaves=("rank_collapse",),
        line='clearhead.ModelConfig(..., norm="pre")', overrides={"norm_placement": "pre", "layers": layers},
        predicted=trace(layers, growth=1.1, stacks=stacks), command=None,
    )  # fmt: skip


def poisoned(layers: int = 6) -> Report:
    """A report whose measurement overflows: infinite from layer 2 on, undefined from layer 3 on."""
    whole = report(layers)
    assert whole.measured is not None
    taps = []
    for tap in whole.measured:
        if tap.layer is not None and tap.layer >= 2 and tap.attention is not None:
            stats = replace(tap.attention, score_variance=math.nan, entropy=math.nan, largest_weight=math.inf)
            tap = replace(tap, attention=stats, matrix_gradients=dict.fromkeys(tap.matrix_gradients, math.nan))
        if tap.layer == 2:
            tap = replace(tap, forward=Moments(0.0, math.inf, 0.0), backward=GradientMoments(0.0, 0.0))
        elif tap.layer is not None and tap.layer > 2:
            tap = replace(tap, forward=Moments(math.nan, math.nan, math.nan), backward=GradientMoments(math.nan, 0.0))
        taps.append(tap)
    wrong = finding("not_finite", depth=2, source="measured", value=math.inf, threshold=math.inf,
        evidence="the stream is infinite at decoder.2.attention.input.")  # fmt: skip
    facts = {**whole.facts, "loss": math.nan}
    return replace(whole, measured=replace(whole.measured, taps=tuple(taps)), findings=(wrong,), facts=facts)


CASES: dict[str, Callable[[], Report]] = {
    "4 layers": report,
    "fine": lambda: report(broken=False),
    "24 layers, post-norm": lambda: report(24, placement="post"),
    "192 layers": lambda: report(192, fading=0.97, growth=1.02),
    "two stacks": lambda: report(6, stacks=("encoder", "decoder")),
    "no measurement": lambda: report(12, measured=False),
    "no statistics": lambda: report(statistics=False),
    "no gradients": lambda: report(gradients=False),
    "not finite": poisoned,
    "hostile names": lambda: replace(
        report(),
        title="</script><b>&[red]x[/]",
        facts={"</script><i>": "[bold]<b>&", "nested": {"a_b": [1, 2.5]}},
        advice=(advice(title="<img src=x>[red]", line="f('</script>')", command="echo '<&>' [red]x[/red]"),),
    ),
}
