"""Looking inside a model while it trains: a compact record every so many steps, and a warning when it goes wrong.

A look is a `measure` on the step's own batch, so it costs about one step more and changes nothing: a run with and a run
without it have the same weights, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch.nn as nn
from torch import Tensor

from clearhead.signal.measurement import measure
from clearhead.signal.trace import Trace

Record = dict[str, Any]

TAPS = ("input", "branch", "output", "attention")
COLLAPSED = 0.98
"""Token correlation of the stream from which on tokens can hardly be told apart."""
SATURATED = 0.1
"""Attention entropy as a share of the entropy of equal weights, below which softmax passes little gradient."""
SHARP = 16.0
"""Variance of the scores of one query: a standard deviation of 4."""
SPREAD = 1e4
"""Largest over smallest gradient variance along the stream, its first place left out (before the first branch the
stream of a pre-norm model is small, and its gradient large, in healthy runs too)."""
VARIANCE_DRIFT = 4.0
"""Growth or fall of the largest stream variance since the first record after warm-up."""
GRADIENT_DRIFT = 10.0
"""Growth of the gradient's spread since then."""


def record_of(trace: Trace, step: int) -> Record:
    """The record of a trace, plain values for JSON: lists run over the layers of each stack; None = not finite."""
    stacks: dict[str, Any] = {}
    for name in dict.fromkeys(tap.stack for tap in trace):
        stream = [tap for tap in trace.stream(name) if tap.part in ("attention", "output")]
        attentions = [tap.attention for tap in trace if tap.stack == name and tap.attention is not None]
        branches = trace.at("branch", stack=name)
        stacks[name] = {
            "variance": [_finite(tap.forward.variance) for tap in stream if tap.forward],
            "correlation": [_finite(tap.forward.correlation) for tap in stream if tap.forward],
            "gradient_variance": [_finite(tap.backward.variance) for tap in stream if tap.backward],
            "parameter_gradient": [_finite(tap.parameter_gradient) for tap in branches],
            "score_variance": [_finite(stats.score_variance) for stats in attentions],
            "entropy": [
                _finite(stats.entropy / stats.uniform_entropy if stats.uniform_entropy > 0 else 1.0)
                for stats in attentions
            ],
        }
    return {"step": step, "loss": _finite(trace.facts["loss"]), "stacks": stacks}


class SignalWatch:
    """Measures every `every` steps, keeps the first record after `settled` steps, and compares later ones with it.

    Thresholds are this module's constants. A kind of warning is given when it begins, and again only after it was over.
    """

    def __init__(self, every: int, *, settled: int = 0, rows: int = 64) -> None:
        self.every, self.settled, self.rows = every, settled, rows
        self._reference: Record | None = None
        self._standing: set[str] = set()

    def due(self, step: int) -> bool:
        """Whether to look before step number `step` (counted from 0, so the first look is at initialisation)."""
        return self.every > 0 and step % self.every == 0

    def look(
        self, model: nn.Module, batch: Any, step: int, *, loss: Callable[[Any, Any], Tensor] | None = None
    ) -> tuple[Record, list[str]]:
        """Measure (`batch` and `loss` as there); return the record and the warnings that begin with it."""
        trace = measure(model, batch, loss=loss, rows=self.rows, taps=TAPS, seed=step)
        record = record_of(trace, step)
        return record, self.judge(record)

    def replay(self, records: Iterable[Record]) -> None:
        """Take in the records of earlier starts of the same run, without warning again."""
        for record in records:
            self.judge(record)

    def judge(self, record: Record) -> list[str]:
        """The warnings that begin with this record."""
        found = dict(_absolute(record))
        if self._reference is not None:
            found |= dict(_drift(record, self._reference))
        elif record["step"] >= self.settled:
            self._reference = record
        begun = [text for kind, text in found.items() if kind not in self._standing]
        self._standing = set(found)
        return begun


def _absolute(record: Record) -> Iterable[tuple[str, str]]:
    step = record["step"]
    for name, stack in record["stacks"].items():
        if not _is_finite(stack):
            yield f"{name} finite", f"step {step}: the {name} holds numbers that are not finite"
            continue
        if stack["correlation"] and max(stack["correlation"]) > COLLAPSED:
            layer = _first(stack["correlation"], lambda r: r > COLLAPSED)
            yield (
                f"{name} collapse",
                f"step {step}: rank collapse in the {name}: the tokens' correlation is "
                f"{stack['correlation'][layer]:.3f} at layer {layer} of {len(stack['correlation']) - 1} (a sound run "
                f"may pass through this while it learns no more than how frequent each token is)",
            )
        if stack["entropy"] and min(stack["entropy"]) < SATURATED:
            layer = _first(stack["entropy"], lambda h: h < SATURATED)
            yield (
                f"{name} entropy",
                f"step {step}: attention saturates in the {name}: at layer {layer} its entropy is "
                f"{stack['entropy'][layer]:.1%} of that of equal weights",
            )
        if stack["score_variance"] and max(stack["score_variance"]) > SHARP:
            layer = _first(stack["score_variance"], lambda v: v > SHARP)
            yield (
                f"{name} scores",
                f"step {step}: large scores in the {name}: at layer {layer} their variance is "
                f"{stack['score_variance'][layer]:.3g}",
            )
        spread = _spread(stack)
        if spread is not None and spread > SPREAD:
            yield (
                f"{name} spread",
                f"step {step}: gradients of the {name} differ by {spread:.1e} in variance between its layers",
            )


def _drift(record: Record, reference: Record) -> Iterable[tuple[str, str]]:
    step, since = record["step"], reference["step"]
    for name, stack in record["stacks"].items():
        first: Mapping[str, Any] = reference["stacks"].get(name, {})
        if not _is_finite(stack):
            continue
        now, before = _largest(stack.get("variance")), _largest(first.get("variance"))
        if now is not None and before is not None and not 1 / VARIANCE_DRIFT <= now / before <= VARIANCE_DRIFT:
            yield (
                f"{name} variance",
                f"step {step}: the largest stream variance of the {name} went from {before:.3g} (step {since}) to "
                f"{now:.3g}",
            )
        spread, earlier = _spread(stack), _spread(first)
        if spread is not None and earlier is not None and GRADIENT_DRIFT * earlier < spread <= SPREAD:
            yield (
                f"{name} gradient",
                f"step {step}: the gradients of the {name}'s layers differ by {spread:.3g} in variance; it was "
                f"{earlier:.3g} at step {since}",
            )


def _is_finite(stack: Mapping[str, Any]) -> bool:
    return all(value is not None for values in stack.values() for value in values)


def _spread(stack: Mapping[str, Any]) -> float | None:
    values = stack.get("gradient_variance", [])[1:]
    if len(values) < 2 or any(value is None for value in values) or max(values) == 0.0:
        return None
    return max(values) / min(values) if min(values) > 0.0 else math.inf


def _largest(values: list[float | None] | None) -> float | None:
    known = [value for value in values or [] if value is not None]
    return max(known) if known and max(known) > 0.0 else None


def _first(values: list[float], test: Any) -> int:
    return next(index for index, value in enumerate(values) if test(value))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
