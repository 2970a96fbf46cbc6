"""A call with few queries and no gradient as a single tile: what decoding does for each token and layer.

The same rule on the same scores as `chunked.py`, without what only many tiles or a backward pass need: no operator of
its own, no copies of keys and values, which in a cache are a view of longer buffers. Shapes: b batch, h query heads,
g key/value heads, r = h / g, n queries, m keys, d head dim of queries and keys, e of values, w columns that are seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearhead.attention.call import Call
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.terms import Rows
from clearhead.kernels.rule import TILE_RULES, Hidden

FEW = 16  # queries; more are worth their tiles
ELEMENTS = 1 << 20  # scores, so that memory stays bounded whatever batch, heads and length


def fits(call: Call) -> bool:
    """Whether `one_tile` may serve."""
    b, h, _, n, m = call.sizes
    if torch.compiler.is_compiling() or call.dropout_p > 0.0 or call.mask.blocks is not None:
        return False
    learned = [] if call.bias is None else call.bias.tensors()
    if torch.is_grad_enabled() and any(t.requires_grad for t in (call.q, call.k, call.v, *learned)):
        return False
    return 0 < n <= FEW and b * h * n * m <= ELEMENTS


@without_autocast
def one_tile(call: Call) -> Tensor:
    """Return the output [b, h, n, e] in working precision (float64, else float32)."""
    b, h, g, n, m = call.sizes
    dtype, e = working_dtype(call.q.dtype), call.v.shape[-1]
    # Without a batch row a mask's tensors are empty, and have no least and largest to bound keys by.
    low, high = call.mask.key_bounds(0, n, m) if b else (0, 0)
    if low == high:
        return call.q.new_zeros(b, h, n, e, dtype=dtype)
    hide = Hidden(_pieces(call, low, high), call.mask.may_have_empty_rows(n, m))
    # Grouped queries are rows of one product with their key head.
    q_bgrd = (call.q.to(dtype) * call.scale).reshape(b, g, -1, call.q.shape[-1])
    k_bgwd, v_bgwe = call.k[:, :, low:high].to(dtype), call.v[:, :, low:high].to(dtype)
    scores_bhnw = (q_bgrd @ k_bgwd.mT).view(b, h, n, -1)
    if call.bias is not None:
        scores_bhnw.add_(call.bias.block(_rows(call, low, high)))
    weights = call.spec.weights
    w_bhnw, factor = TILE_RULES[type(weights)](weights).weights(scores_bhnw, hide)
    out = (w_bhnw.reshape(b, g, -1, w_bhnw.shape[-1]) @ v_bgwe).view(b, h, n, e)
    return out if factor is None else out.mul_(factor)


def _rows(call: Call, low: int, high: int) -> Rows:
    """All queries, and columns low..high-1."""
    device, offset = call.q.device, call.mask.resolved_offset()
    return Rows(torch.arange(call.q.shape[2], device=device), torch.arange(low, high, device=device), offset)


def _pieces(call: Call, low: int, high: int) -> list[tuple[slice, Tensor]]:
    """What is hidden of columns low..high-1; nothing where each query sees all of them, as a lone causal one does."""
    if call.mask.sure_bounds(0, call.q.shape[2], call.k.shape[2]) == (low, high):
        return []
    seen = call.mask.visible(_rows(call, low, high))
    return [] if seen is None else [(slice(None), ~seen)]
