"""What the position part of a temperature counts, read from the mask of a call.

For a query, n is the number of keys it sees. For a value it depends on how attention looks:

- causal: the value's own place in its document, from 1. Padding does not count, a cache does, a window does not cut it.
- both ways: the number of keys that its own token sees, because a place says nothing about how many keys compete.
- cross: the number of keys of its source.

The mask is what decides, not position ids: left padding, packed documents, static caches with empty slots and beams are
all in it. One thing is not: a cache that dropped the keys a window has passed no longer shows how many there were, and
there the call's position ids are read (`generate` makes them, counted from the first real token).

Legend: b batch, h query heads, g key/value heads, n query rows, m keys. A dimension of 1 stands for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearhead.attention.blocks import Blocks
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.terms import Band, Dense, Segments
from clearhead.errors import UserError


def query_counts(spec: AttentionSpec, mask: Mask, heads: int, n: int, m: int, device: torch.device) -> Tensor:
    """Keys that each query sees, the spec's own pattern included: [1|b, 1|h, n]."""
    return spec.pattern.within(mask, heads, m).visible_count(n, m, device)


def value_counts(
    role: str,
    seen: Tensor,
    mask: Mask,
    n: int,
    m: int,
    kv_heads: int,
    *,
    window: int | None = None,
    position_ids: Tensor | None = None,
) -> Tensor:
    """What the values count, [1|b, 1|g, m or 1]; see the top of this file.

    Args:
        role: causal | bidirectional | cross.
        seen: `query_counts` of the call.
        window: the call's own sliding window, if its mask has one in it.
        position_ids: [1|b, n], 0-based, of the call's tokens; read only where a window may have dropped keys.
    """
    if role == "cross":
        return _by_group(seen, kv_heads).amax(dim=-1, keepdim=True)
    if role == "bidirectional":
        if n != m:
            raise ValueError(f"bidirectional attention: expected as many queries as keys, got {n} and {m}")
        return _by_group(seen, kv_heads)
    if role != "causal":
        raise ValueError(f"role: expected causal, bidirectional or cross, got {role!r}")
    if window is not None and n < m and m >= window:
        return _places_behind_a_window(mask, n, m, window, position_ids, seen.device)
    dense = [term.mask for term in mask.terms if isinstance(term, Dense)]
    if not dense:
        return _places(mask, m, seen.device)
    whole = mask.dense_tensor(n, m, seen.device)
    assert whole is not None
    whole_b1nm = whole[:, :1].expand(-1, -1, n, m)
    if n != m:
        return _places_of_keys(whole_b1nm)
    if window is None and not any(isinstance(term, Band | Blocks) for term in mask.terms):
        return whole_b1nm.sum(-1)  # a token sees its whole past, itself included
    return _places_in_windows(whole_b1nm)


def _by_group(seen: Tensor, kv_heads: int) -> Tensor:
    """Counts of query heads [1|b, 1|h, n] as those of key/value heads: of a group, the one that sees most."""
    if seen.shape[1] in (1, kv_heads):
        return seen
    return seen.unflatten(1, (kv_heads, -1)).amax(dim=2)


def _places(mask: Mask, m: int, device: torch.device) -> Tensor:
    """Of a mask made of terms: how many keys of its document stand before each key, itself included."""
    terms = [term for term in mask.terms if not isinstance(term, Band | Blocks)]
    square = tuple(Segments(term.key, term.key) if isinstance(term, Segments) else term for term in terms)
    return Mask(square, 0).visible_count(m, m, device)


def _places_of_keys(seen_b1nm: Tensor) -> Tensor:
    """Rows that look back on a cache: the place of a key is how many keys up to it a row sees that sees it too.

    All rows of its document say the same.
    """
    return (seen_b1nm.long().cumsum(-1) * seen_b1nm).amax(dim=-2)


def _places_in_windows(seen_b1mm: Tensor) -> Tensor:
    """As many rows as keys, windows cut the past off: a document begins at a row that sees itself alone."""
    own_b1m = seen_b1mm.diagonal(dim1=-2, dim2=-1)
    begins = own_b1m & (seen_b1mm.sum(-1) == 1)
    counted = own_b1m.long().cumsum(-1)
    before = torch.where(begins, counted - 1, 0).cummax(dim=-1).values
    return counted - before


def _places_behind_a_window(
    mask: Mask, n: int, m: int, window: int, position_ids: Tensor | None, device: torch.device
) -> Tensor:
    """Fewer rows than keys and a window: the keys stand in a row, and the last row's last visible key is its own.

    While that row sees fewer keys than the window has, nothing is missing and what it sees is its place.
    """
    if position_ids is None:
        raise UserError(
            "selective temperatures with a sliding window and a cache need position_ids in the call, because the cache "
            "drops what the window has passed; this model does not hand them on, so decode without a cache, or use "
            "TemperatureOptions(parts='token')"
        )
    whole = mask.dense_tensor(n, m, device)
    place = torch.arange(m, device=device)
    last_b1 = torch.full((1, 1), m - 1, device=device)
    seen_b1 = last_b1 + 1
    if whole is not None:
        row_bm = whole[:, 0, -1].long()
        last_b1, seen_b1 = (row_bm * place).amax(dim=-1, keepdim=True), row_bm.sum(dim=-1, keepdim=True)
    own_b1 = torch.where(seen_b1 < window, seen_b1, position_ids[:, -1:].long() + 1)
    return (own_b1 - last_b1 + place)[:, None].clamp_min(1)
