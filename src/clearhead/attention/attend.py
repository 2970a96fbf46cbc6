"""`attend`: one door to every attention of the algebra.

Tensors in, tensors out: checks, temperatures, cache, mask, then a backend (`backends.py`). Shapes: b batch, h query
heads, g key/value heads (h a multiple of g), n queries, m keys, d head dim of queries and keys, e of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from clearhead.attention.backends import choose
from clearhead.attention.bias import Bias
from clearhead.attention.call import Call, check_tensors, zero_unseen
from clearhead.attention.extras import measure, refuse_extras
from clearhead.attention.mask import Mask
from clearhead.attention.observe import WATCHERS
from clearhead.attention.performer import projection_for, refuse_performer
from clearhead.attention.selective import Temperatures, selective
from clearhead.attention.spec import AttentionSpec, Laser, Performer
from clearhead.memory.performer import PerformerState


class State(Protocol):
    """What `attend` needs of a cache (`memory/cache.py`)."""

    def append(self, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        """Take this call's keys and values; return all keys and values, and the call's mask over them."""
        ...

    def mark(self) -> Any:
        """What `rollback` needs to forget later appends."""
        ...

    def rollback(self, mark: Any) -> None:
        """Forget everything appended since `mark`."""
        ...


@dataclass(frozen=True, eq=False)
class AttentionOutput:
    """`out` [b, h, n, e]; the state after the call; the extras that were asked for, by name."""

    out: Tensor
    state: Any = None
    extras: dict[str, Tensor] = field(default_factory=dict)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec | str = "softmax",
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    temperatures: Temperatures | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    state: State | None = None,
    want: Iterable[str] = (),
    backend: str = "auto",
    projection: Tensor | Literal[False] | None = None,
) -> AttentionOutput:
    """Attention by `spec`: out = read(weights(scale * Q K^T + bias), V) over the keys that mask and pattern let a
    query see.

    Args:
        query: [b, h, n, d]. key, value: [b, g, m, d] and [b, g, m, e], h a multiple of g (grouped queries).
        spec: the four choices, as text or `AttentionSpec` (see `attention/spec.py`).
        mask: visibility (see `attention/mask.py`); None sees everything. The spec's pattern is added to it.
        bias: a position term added to the scaled scores (see `attention/bias.py`).
        temperatures: inverse temperatures, required by a spec with `selective` or `learned`.
        scale: of the scores; 1 / sqrt(d) if None.
        dropout_p: on the weights, after any product; refused for LASER.
        state: a cache: this call's keys and values are appended, and attention runs over all it holds. The mask then
            speaks of this call's tokens (causality and key ranges; a causal mask's offset comes from the state).
        want: extras to compute, detached: "weights" [b,h,n,m], "entropy", "lse", "max_score", "max_weight",
            "visible" (each [b,h,n]).
        backend: "auto", or the name of one; `explain` tells what would serve and why.
        projection: performer only: the rows of its random features, [m, d] or [h, m, d], used as they are; False: none
            (relu only, features of the bare queries and keys); None: drawn from the spec's seed.

    A query that sees no key gives 0, with gradient 0. Keys that no query can see (padding) may hold anything.

    Raises `ValueError` or `TypeError` with what was expected, what was got and what to do.
    """
    before = None if state is None else state.mark()
    try:
        call = make_call(
            query, key, value, spec, mask=mask, bias=bias, temperatures=temperatures, scale=scale, dropout_p=dropout_p,
            state=state, projection=projection,
        )  # fmt: skip
        for watcher in WATCHERS:
            watcher(call)
        names = tuple(want)
        if names:
            refuse_extras(call, names)
        out = choose(call, backend).run(call)
        return AttentionOutput(out, state, measure(call, names) if names else {})
    except Exception:
        if state is not None:
            state.rollback(before)  # a refused call leaves the cache as it was
        raise


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec | str,
    *,
    mask: Mask | None = None,
    bias: Bias | None = None,
    temperatures: Temperatures | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    state: State | None = None,
    projection: Tensor | Literal[False] | None = None,
) -> Call:
    """Check the arguments of `attend` and decide everything but the backend."""
    spec = _parse(spec)
    check_tensors(query, key, value)
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p: expected a probability in [0, 1], got {dropout_p}")
    if dropout_p > 0.0 and isinstance(spec.read, Laser):
        raise ValueError(
            "laser refuses attention dropout: rows of dropped weights do not sum to 1, so the value shift inside "
            "log(A exp V) would change the result; use dropout_p=0 (drop out the layer's output instead)"
        )
    mask = Mask() if mask is None else mask
    rows, sums = None, None
    if isinstance(spec.weights, Performer):
        refuse_performer(spec.weights, query.dtype, mask, bias, temperatures, scale, dropout_p)
        rows = projection_for(spec.weights, query, projection)
        if rows.dim() == 3 and key.shape[1] != query.shape[1]:  # a head of its own rows needs keys of its own
            times = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(times, dim=1), value.repeat_interleave(times, dim=1)
    elif projection is not None:
        raise ValueError(f"projection: only performer has random features, not {spec.text!r}; leave it out")
    query, key, value = _apply_temperatures(spec, query, key, value, temperatures)
    if isinstance(state, PerformerState):
        if not isinstance(spec.weights, Performer):
            raise ValueError(f"state: a PerformerState serves performer only, not {spec.text!r}; use a KVCache")
        sums = state
        state.check(spec, key, value, mask)
    elif state is not None:
        key, value, mask = state.append(key, value, mask)
    b, h, n, d = query.shape
    m = key.shape[2]
    mask = spec.pattern.within(mask, h, m).resolve(n, m)
    mask.check(b, h, n, m)
    if bias is not None:
        bias = bias.within(mask.terms)
        bias.check(b, h, n, m)
    scale = 1.0 / math.sqrt(d) if scale is None else float(scale)
    return zero_unseen(Call(query, key, value, spec, mask, bias, scale, dropout_p, projection=rows, sums=sums))


_PARSED: dict[str, AttentionSpec] = {}


def _parse(spec: AttentionSpec | str) -> AttentionSpec:
    """Parse, remembering what a text means: a compiled graph cannot trace the parser, but it can look into a table."""
    if isinstance(spec, AttentionSpec):
        return spec
    if not isinstance(spec, str):
        return AttentionSpec.parse(spec)
    _remember(spec)
    return _PARSED[spec]


@torch.compiler.assume_constant_result
def _remember(text: str) -> bool:
    if text not in _PARSED:
        _PARSED[text] = AttentionSpec.parse(text)
    return True


def _apply_temperatures(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, temperatures: Temperatures | None
) -> tuple[Tensor, Tensor, Tensor]:
    if spec.temperature is None:
        if temperatures is not None:
            raise ValueError(
                f"temperatures were given but attention {spec.text!r} has none; write {spec.text}+selective"
            )
        return q, k, v
    if temperatures is None or (temperatures.query is temperatures.key is temperatures.value is None):
        raise ValueError(
            f"attention {spec.text!r} needs its temperatures: pass temperatures=Temperatures(query=..., value=...), "
            "or use clearhead's Attention layer, which learns them"
        )
    return selective(
        q, k, v,
        query_temperature=temperatures.query, key_temperature=temperatures.key, value_temperature=temperatures.value,
    )  # fmt: skip
