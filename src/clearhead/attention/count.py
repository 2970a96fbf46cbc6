"""How many keys each query sees, in time linear in length: what it sees is a handful of runs of keys.

Causality, windows and padding leave one run; BigBird's blocks cut it into disjoint pieces, as many as a row has blocks;
of packed documents only the keys of the query's own segment count, which a sorted list of (segment, place) tells.
Shapes: b batch, h query heads, n queries, m keys; every end of a run broadcasts to [b, h, n].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clearhead.attention.blocks import Blocks
from clearhead.attention.terms import Band, Causal, KeyRange, Rows, Segments, Term


def count_runs(terms: tuple[Term, ...], offset: int | Tensor, n: int, m: int, device: torch.device) -> Tensor | None:
    """[1|b, 1|h, n] int64; None for terms that no few runs describe (dense masks, a prefix)."""
    kinds = {kind: [t for t in terms if isinstance(t, kind)] for kind in (Blocks, Segments)}
    plain = [t for t in terms if isinstance(t, Band | KeyRange) or (isinstance(t, Causal) and t.prefix == 0)]
    if len(plain) + sum(map(len, kinds.values())) < len(terms) or any(len(own) > 1 for own in kinds.values()):
        return None
    position = Rows(
        torch.arange(n, device=device), torch.arange(0, device=device), offset
    ).positions()  # [1|b, 1, n, 1]
    low, high = _interval(plain, position.squeeze(-1), m)
    runs = [(low, high)]
    for blocks in kinds[Blocks]:
        assert isinstance(blocks, Blocks)
        pieces = blocks.runs(position, low, high)
        runs = [(torch.maximum(low, a), torch.minimum(high, b)) for a, b in pieces]
    for segments in kinds[Segments]:
        assert isinstance(segments, Segments)
        return sum((_in_segment(segments, *run) for run in runs), torch.zeros_like(low))
    return sum(((b - a).clamp_min(0) for a, b in runs), torch.zeros_like(low))


def _interval(terms: Sequence[Term], position: Tensor, m: int) -> tuple[Tensor, Tensor]:
    low, high = torch.zeros_like(position), torch.full_like(position, m)
    for term in terms:
        if isinstance(term, Causal):
            high = torch.minimum(high, position + 1)
        elif isinstance(term, Band):
            low = torch.maximum(low, position - term.left)
            high = torch.minimum(high, position + term.right + 1)
        elif isinstance(term, KeyRange):
            if term.start is not None:
                low = torch.maximum(low, term.start.view(-1, 1, 1))
            if term.end is not None:
                high = torch.minimum(high, term.end.view(-1, 1, 1))
    return low, high


def _in_segment(segments: Segments, low: Tensor, high: Tensor) -> Tensor:
    """Keys of the query's own segment in [low, high): places in the sorted list of (segment, place of the key)."""
    m = segments.key.shape[1]
    place = torch.arange(m, device=segments.key.device)
    listed = (segments.key.long() * (m + 1) + place).sort(dim=1).values  # [1|b, m]
    own = segments.query.long()[:, None]  # [1|b, 1, n]
    first, last = (own * (m + 1) + end.clamp(0, m) for end in (low, torch.maximum(low, high)))
    b, h, n = torch.broadcast_shapes(first.shape, last.shape, (listed.shape[0], 1, 1))
    listed = listed.expand(b, -1).contiguous()
    ends = [torch.searchsorted(listed, x.expand(b, h, n).reshape(b, h * n)) for x in (first, last)]
    return (ends[1] - ends[0]).view(b, h, n).masked_fill(own < 0, 0)
