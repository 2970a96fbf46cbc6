"""What the position part of a temperature counts, read from the mask of a call.

For a query, n is the number of keys it sees. For a value it depends on how attention looks:

- causal: the value's own place in its document, from 1. Padding does not count, a cache does, a window does not cut it.
- both ways: the number of keys that its own token sees, because a place says nothing about how many keys compete.
- cross: the number of keys of its source.

The mask decides, never position ids: left padding, packed documents, caches with empty slots and beams are all in it.
A cache that has dropped what a window passed is not: how many tokens of each row are gone is handed over beside it.

Legend: b batch, h query heads, g key/value heads, n query rows, m keys. A dimension of 1 stands for all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearhead.attention.blocks import Blocks
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.terms import Band, Dense, Segments


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
    windowed: bool = False,
    dropped: Tensor | int = 0,
) -> Tensor:
    """What the values count, [1|b, 1|g, m or 1]; see the top of this file.

    Args:
        role: causal | bidirectional | cross.
        seen: `query_counts` of the call.
        mask: of the call, without the spec's pattern.
        windowed: a sliding window is in the mask.
        dropped: tokens before the first key that a cache no longer holds: a number, or [b].
    """
    if role == "cross":
        return _by_group(seen, kv_heads).amax(dim=-1, keepdim=True)
    if role == "bidirectional":
        if n != m:
            raise ValueError(f"bidirectional attention: expected as many queries as keys, got {n} and {m}")
        return _by_group(seen, kv_heads)
    if role != "causal":
        raise ValueError(f"role: expected causal, bidirectional or cross, got {role!r}")
    gone = dropped.view(-1, 1, 1) if isinstance(dropped, Tensor) else dropped
    return _places(mask, n, m, seen.device, windowed) + gone


def _by_group(seen: Tensor, kv_heads: int) -> Tensor:
    """Counts of query heads [1|b, 1|h, n] as those of key/value heads: of a group, the one that sees most."""
    if seen.shape[1] in (1, kv_heads):
        return seen
    return seen.unflatten(1, (kv_heads, -1)).amax(dim=2)


def _places(mask: Mask, n: int, m: int, device: torch.device, windowed: bool) -> Tensor:
    """Of each key that is held, how many of its document's are held up to it: [1|b, 1, m]."""
    rows = [term.mask.shape[-2] for term in mask.terms if isinstance(term, Dense)]
    columns_only = mask.is_causal and not windowed and max(rows, default=1) == 1  # real tokens with gaps between them
    if not rows or columns_only:
        terms = [term for term in mask.terms if not isinstance(term, Band | Blocks)]
        square = tuple(Segments(term.key, term.key) if isinstance(term, Segments) else term for term in terms)
        return Mask(square, 0).visible_count(m, m, device)
    whole = mask.dense_tensor(n, m, device)
    assert whole is not None
    whole_b1nm = whole[:, :1].expand(-1, -1, n, m)
    if n == m:
        return _places_in_windows(whole_b1nm) if windowed else whole_b1nm.sum(-1)
    if windowed:
        return _places_behind_a_window(whole_b1nm)
    # A key's place is how many keys up to it a row sees that sees it too; all rows of its document say the same.
    return (whole_b1nm.long().cumsum(-1) * whole_b1nm).amax(dim=-2)


def _places_in_windows(seen_b1mm: Tensor) -> Tensor:
    """As many rows as keys, windows cut the past off: a document begins at a row that sees itself alone."""
    own_b1m = seen_b1mm.diagonal(dim1=-2, dim2=-1)
    begins = own_b1m & (seen_b1mm.sum(-1) == 1)
    counted = own_b1m.long().cumsum(-1)
    before = torch.where(begins, counted - 1, 0).cummax(dim=-1).values
    return counted - before


def _places_behind_a_window(seen_b1nm: Tensor) -> Tensor:
    """Fewer rows than keys and windows: one document, whose keys are those that some row sees, and all between them."""
    some_b1m = seen_b1nm.any(dim=-2).long()
    begun = some_b1m.cummax(dim=-1).values
    return begun.cumsum(-1).clamp_min(1)
