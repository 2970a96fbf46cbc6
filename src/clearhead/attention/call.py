"""`Call`: one attention call with everything decided, as the backends see it.

Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d head dim of queries and keys, e of values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.terms import Band, Causal


@dataclass(frozen=True, eq=False)
class Call:
    """`mask` is resolved and holds the spec's pattern; `unseen`, its padding keys, are zeroed: [1|b, 1|g, m, 1]."""

    q: Tensor
    k: Tensor
    v: Tensor
    spec: AttentionSpec
    mask: Mask
    bias: Bias | None
    scale: float
    dropout_p: float
    unseen: Tensor | None = None
    projection: Tensor | None = None
    """Rows of a performer's random features: [m, d], or [h, m, d]."""
    sums: Any = None
    """A performer's recurrent state (`memory/performer.py`): the keys of earlier calls."""

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """(b, h, g, n, m)."""
        return self.q.shape[0], self.q.shape[1], self.k.shape[1], self.q.shape[2], self.k.shape[2]

    def with_tensors(self, q: Tensor, k: Tensor, v: Tensor) -> Call:
        """The same call on other tensors of the same shapes."""
        return replace(self, q=q, k=k, v=v)

    def on_seen_keys(self) -> Call:
        """The same call on the run of keys that its queries may see: a window's decoding reads a window, not a cache.

        Only where there is a window, every term of the mask is told by positions alone, and there is no bias.
        """
        terms, offset = self.mask.terms, self.mask.resolved_offset()
        told = all(isinstance(t, Band) or (isinstance(t, Causal) and t.prefix == 0) for t in terms)
        windowed = told and any(isinstance(t, Band) for t in terms)
        if not windowed or self.bias is not None or not isinstance(offset, int) or torch.compiler.is_compiling():
            return self
        _, _, _, n, m = self.sizes
        low, high = self.mask.key_bounds(0, n, m)
        if low == high or high - low == m:
            return self
        mask = replace(self.mask, offset=offset - low)
        return replace(self, k=self.k[:, :, low:high], v=self.v[:, :, low:high], mask=mask)

    def some_visible(self) -> Tensor | None:
        """[1|b, 1|h, n, 1] bool: whether a query sees any key; None when all surely do."""
        _, _, _, n, m = self.sizes
        if not self.mask.may_have_empty_rows(n, m):
            return None
        return self.mask.some_visible(n, m, self.q.device).unsqueeze(-1)


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise `ValueError`/`TypeError` with what was expected and what was got."""
    for name, t in (("query", q), ("key", k), ("value", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}")
        if t.dim() != 4:
            raise ValueError(f"{name}: expected [batch, heads, length, head dim], got shape {tuple(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {t.dtype}")
    shapes = f"query {tuple(q.shape)}, key {tuple(k.shape)}, value {tuple(v.shape)}"
    if not (q.dtype == k.dtype == v.dtype):
        raise TypeError(f"query, key and value must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not (q.device == k.device == v.device):
        raise ValueError(f"query, key and value must be on one device, got {q.device}, {k.device}, {v.device}")
    if not (q.shape[0] == k.shape[0] == v.shape[0]):
        raise ValueError(f"batch sizes differ: {shapes}")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise ValueError(f"key and value must agree in heads and length: {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"query and key must agree in head dim: {shapes}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(
            f"the number of query heads must be a multiple of the key/value heads: {q.shape[1]} and {k.shape[1]}"
        )


def zero_unseen(call: Call) -> Call:
    """Zero padding keys and values, and queries that see nothing, so that garbage there (even NaN) touches nothing."""
    _, _, g, _, m = call.sizes
    unseen = call.mask.unseen_keys(m, g, call.k.device)
    k, v, q = call.k, call.v, call.q
    if unseen is not None:
        k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
    some = call.some_visible()
    if some is not None:
        q = q.masked_fill(~some, 0.0)
    if unseen is None and some is None:
        return call
    return replace(call, q=q, k=k, v=v, unseen=unseen)


def float64_available(device: torch.device) -> bool:
    """Whether the device computes in float64 (Apple's MPS does not)."""
    return device.type != "mps"
