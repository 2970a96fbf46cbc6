"""What was found at each place of a model, predicted or measured: one shape for both. Imports no torch.

Places of a sub-layer, in the order of the computation:

    input    the stream as the sub-layer receives it
    normed   pre-norm: what the norm hands to the branch
    branch   what the branch's last matrix answers, before dropout and any scale
    sum      post-norm: the scaled sum that the norm reads

A tap's name is `stack.layer.part.place`, as in `decoder.3.attention.branch`; besides there are `stack.embedding` (after
its norm and dropout), `stack.output` (the stream after the last layer, before a final norm), `stack.normed` (after it)
and `logits`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from clearhead.signal.moments.types import GradientMoments, Moments

PLACES = ("input", "normed", "branch", "sum")


@dataclass(frozen=True)
class AttentionStats:
    """How the attention weights of one layer look; means over heads and (measured) sampled query rows.

    A prediction leaves out what the theory does not give (None).
    """

    score_variance: float
    """Variance of the scaled scores over the visible keys of one query (what softmax reacts to)."""
    entropy: float
    """- sum a log a, in nats."""
    uniform_entropy: float
    """Entropy of equal weights on the visible keys: mean of log(number of visible keys)."""
    largest_weight: float
    """max_j a_j."""
    participation: float
    """sum_j a_j^2; 1 / participation is the effective number of keys."""
    jacobian_gain: float
    """||diag(a) - a a^T||_F^2: what softmax passes of a random change of the scores. 1/n - 1/n^2 for n equal weights,
    at most 1/4 (two keys share everything), 0 when one key has everything: saturation."""
    effective_rank: float | None = None
    """exp(entropy of the normalised singular values) of the sampled rows of the attention matrix."""


@dataclass(frozen=True)
class Tap:
    """One place of a model."""

    name: str
    stack: str
    """decoder | encoder."""
    layer: int | None
    part: str
    """embedding | attention | cross_attention | feed_forward | output | logits."""
    place: str
    forward: Moments | None = None
    backward: GradientMoments | None = None
    """Gradient of the loss by this activation."""
    attention: AttentionStats | None = None
    """On the `branch` taps of attention."""
    share: float | None = None
    """On `branch` taps: the part of the sum's variance that the branch brings, after its dropout and scale."""
    parameter_gradient: float | None = None
    """On `branch` taps: norm of the gradient of all matrices of the branch."""
    matrix_gradients: Mapping[str, float] = field(default_factory=dict)
    """On `branch` taps: the same by matrix (query, key, value, output; gate, up, down)."""
    effective_rank: float | None = None
    """Measured, on `input` and `output` taps: effective rank of the tokens x features matrix of a sequence."""


@dataclass(frozen=True)
class Trace:
    """The taps of one model from input to output."""

    source: str
    """predicted | measured."""
    taps: tuple[Tap, ...]
    notes: tuple[str, ...] = ()
    """What the reader must know: what was left out, sampled or assumed."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Of the run: tokens, batch, loss, seconds, dtype ..."""

    def __iter__(self) -> Iterator[Tap]:
        return iter(self.taps)

    def __getitem__(self, name: str) -> Tap:
        """The tap of that name; `KeyError` when there is none."""
        for tap in self.taps:
            if tap.name == name:
                return tap
        raise KeyError(name)

    def __contains__(self, name: object) -> bool:
        return any(tap.name == name for tap in self.taps)

    def at(self, place: str, part: str | None = None, stack: str | None = None) -> tuple[Tap, ...]:
        """Taps of one place in the order of depth, of one part and one stack if given."""
        return tuple(
            tap for tap in self.taps if tap.place == place and part in (None, tap.part) and stack in (None, tap.stack)
        )

    def stream(self, stack: str) -> tuple[Tap, ...]:
        """The residual stream of a stack: the input of every sub-layer, then the output."""
        return tuple(tap for tap in self.taps if tap.stack == stack and tap.place in ("input", "output"))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; `from_dict` brings back an equal trace."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Trace:
        """Build from what `to_dict` gave."""
        return cls(
            source=values["source"],
            taps=tuple(_tap(tap) for tap in values["taps"]),
            notes=tuple(values["notes"]),
            facts=dict(values["facts"]),
        )


def _tap(values: Mapping[str, Any]) -> Tap:
    kinds = {"forward": Moments, "backward": GradientMoments, "attention": AttentionStats}
    read = {name: None if values[name] is None else kind(**values[name]) for name, kind in kinds.items()}
    return Tap(**{**values, **read})
