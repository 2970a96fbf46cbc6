"""`Blocks`: BigBird's pattern as a term of a `Mask`; which blocks see which is decided in `bigbird.py`.

A document stands where the call says: from `start` to `end` of each key column (padding, packed documents), or all
keys. A query belongs to the document of the key at its own position. Shapes: b batch, h query heads, n query rows, m
columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import numpy as np
import torch
from torch import Tensor

from clearhead.attention.bigbird import NOTHING, BlockLayout, Ints, drawn_blocks
from clearhead.attention.terms import TERMS, KeyRange, Rows, Segments, Term, narrow_dim


@dataclass(frozen=True, eq=False)
class Blocks(Term):
    """Keys in the blocks that a query's block sees."""

    layout: BlockLayout
    heads: range
    """The query heads that the call has: each draws random blocks of its own."""
    keys: int
    start: Tensor | None = None
    """[1|b, 1|m] int64: where the document of a key column begins; None = 0."""
    end: Tensor | None = None
    """[1|b, 1|m] int64: where it ends; None = at the last key."""

    @classmethod
    def over(cls, layout: BlockLayout, terms: tuple[Term, ...], heads: int, m: int) -> Blocks:
        """The pattern over documents as the call's other terms bound them."""
        starts: list[Tensor] = []
        ends: list[Tensor] = []
        for term in terms if m else ():
            if isinstance(term, KeyRange):
                starts += [] if term.start is None else [term.start[:, None]]
                ends += [] if term.end is None else [term.end[:, None]]
            elif isinstance(term, Segments):
                start, end = document_bounds(term.key)
                starts, ends = [*starts, start], [*ends, end]
        if layout.causal:
            ends = []  # nothing of a causal pattern hangs on where the document ends
        latest, earliest = (
            reduce(pick, x) if x else None for pick, x in ((torch.maximum, starts), (torch.minimum, ends))
        )
        return cls(layout, range(heads), m, latest, earliest)

    # -- the term -----------------------------------------------------------------------------------------------------

    def visible(self, rows: Rows) -> Tensor:
        """See `Term.visible`."""
        start, end = self._document(rows.positions())
        query = rows.positions() - start - self.layout.tokens
        key = rows.keys() - start - self.layout.tokens
        size = self.layout.block
        blocks = (end - start - self.layout.tokens + size - 1).div(size, rounding_mode="floor").clamp_min(1)
        # Rows past their document (padding) count as its last block, so that none is left without a key.
        q_block = torch.minimum(query.div(size, rounding_mode="floor"), blocks - 1)
        k_block = key.div(size, rounding_mode="floor")
        distance = k_block - q_block
        ahead = 0 if self.layout.causal else self.layout.side
        seen = (distance >= -self.layout.side) & (distance <= ahead)
        seen = seen | (k_block < self.layout.first) | (k_block >= blocks - self.layout.last)
        if not self.layout.causal:
            seen = seen | (q_block < self.layout.first) | (q_block >= blocks - self.layout.last)
        if self.layout.tokens:
            seen = seen | (key < 0) | (query < 0)
        if self.layout.random:
            seen = self._with_random(seen, q_block, k_block, blocks)
        # Not beyond the document: a segment number may come again in another one.
        if self.start is not None:
            seen = seen & (rows.keys() >= start)
        return seen if self.end is None else seen & (rows.keys() < end)

    def _with_random(self, seen: Tensor, q_block: Tensor, k_block: Tensor, blocks: Tensor) -> Tensor:
        heads = torch.arange(self.heads.start, self.heads.stop, device=q_block.device)[:, None, None]
        for drawn in drawn_blocks(self.layout, heads, q_block.clamp_min(0), blocks):
            seen = seen | ((k_block == drawn) & (q_block >= 0))
        return seen

    def runs(self, position: Tensor, low: Tensor, high: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What queries at [1|b, 1, n, 1] see, as disjoint runs of keys: ends that broadcast to [b, h, n].

        low, high: the keys that are there at all, for a row that sees everything.
        """
        start, end = self._document(position)
        x, size = self.layout, self.layout.block
        begin, end = (start + x.tokens).squeeze(-1), end.squeeze(-1)
        low, high = torch.maximum(low, start.squeeze(-1)), torch.minimum(high, end)
        query = position.squeeze(-1) - begin
        blocks = (end - begin + size - 1).div(size, rounding_mode="floor").clamp_min(1)
        own = torch.minimum(query.div(size, rounding_mode="floor"), blocks - 1)
        first, last = begin + x.first * size, begin + (blocks - x.last) * size
        window = (begin + (own - x.side) * size, begin + (own + 1 + (0 if x.causal else x.side)) * size)
        runs = [
            (low, first),
            (torch.maximum(window[0], first), torch.minimum(window[1], last)),
            (torch.maximum(first, last), high),
        ]
        if x.random:
            heads = torch.arange(self.heads.start, self.heads.stop, device=position.device)[:, None]
            for drawn in drawn_blocks(x, heads, own.clamp_min(0), blocks):  # never in the window, never global
                at = begin + drawn * size
                runs.append((at, torch.where((drawn == NOTHING) | (own < 0), at, at + size)))
        everything = torch.zeros_like(own, dtype=torch.bool)
        if not x.causal:
            everything = everything | (own < x.first) | (own >= blocks - x.last)
        if x.tokens:
            everything = everything | (query < 0)
        whole, *rest = runs
        cut = [(a, torch.where(everything, a, b)) for a, b in rest]
        return [(whole[0], torch.where(everything, high, whole[1])), *cut]

    def narrow(self, batch: slice, heads: slice) -> Blocks:
        """See `Term.narrow`."""
        cut = [None if t is None else narrow_dim(t, 0, batch) for t in (self.start, self.end)]
        return replace(self, heads=self.heads[heads], start=cut[0], end=cut[1])

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Term.tensors`."""
        return tuple(t for t in (self.start, self.end) if t is not None)

    def numbers(self) -> tuple[int, ...]:
        """See `Term.numbers`."""
        x = self.layout
        shape = (x.block, x.global_blocks, x.window, x.random, x.seed, x.tokens, int(x.released), int(x.causal))
        ends = (int(self.start is not None), int(self.end is not None))
        return (*shape, self.heads.start, self.heads.stop, self.keys, *ends)

    @classmethod
    def decode(cls, numbers: list[int], tensors: Iterator[Tensor]) -> Blocks:
        """See `Term.decode`."""
        block, global_blocks, window, random, seed, tokens, released, causal, *rest = numbers
        first, last, keys, has_start, has_end = rest
        layout = BlockLayout(block, global_blocks, window, random, seed, tokens, bool(released), bool(causal))
        start = next(tensors) if has_start else None
        return cls(layout, range(first, last), keys, start, next(tensors) if has_end else None)

    # -- for kernels --------------------------------------------------------------------------------------------------

    @property
    def rows_alike(self) -> bool:
        """Whether all batch rows stand alike, so that one tile may hold several."""
        return all(t.shape[0] == 1 for t in self.tensors())

    @property
    def heads_alike(self) -> bool:
        """Whether all heads see the same."""
        return self.layout.random == 0

    @property
    def width(self) -> int:
        """Keys that a row between the global ones sees."""
        x = self.layout
        return x.block * (x.first + x.last + x.side + 1 + (0 if x.causal else x.side) + x.random) + x.tokens

    def width_of(self, rows: int) -> int:
        """Keys that so many neighbouring rows between the global ones see together, at most."""
        x, own = self.layout, max(1, rows // self.layout.block)
        window = own + x.side + (0 if x.causal else x.side)
        return x.block * (x.first + x.last + window + own * x.random) + x.tokens

    def columns(self, first: int, last: int) -> tuple[Tensor, bool] | None:
        """(sorted columns that rows at positions first..last-1 may see, whether every row sees all of them).

        None for every column. For one batch row, or rows that stand alike: read on the host.
        """
        if not self.tensors():
            return _listed(self.layout, self.heads, 0, self.keys, self.keys, first, last)
        position = np.arange(first, last)
        starts, ends = (self._host(t, position, other) for t, other in ((self.start, 0), (self.end, self.keys)))
        if (starts == starts[0]).all() and (ends == ends[0]).all():
            return _listed(self.layout, self.heads, int(starts[0]), int(ends[0]), self.keys, first, last)
        parts = []
        for start, end in np.unique(np.stack([starts, ends]), axis=1).T.tolist():
            here = position[(starts == start) & (ends == end)]
            listed = _listed(self.layout, self.heads, start, end, self.keys, int(here[0]), int(here[-1]) + 1)
            parts.append(torch.arange(start, end) if listed is None else listed[0])
        return torch.unique(torch.cat(parts)), False

    def _document(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Start and end of the document at each position [1|b, 1, n, 1]; positions outside count as the nearest key."""
        zero = torch.zeros((), dtype=torch.int64, device=position.device)
        found = []
        for bound, other in ((self.start, zero), (self.end, zero + self.keys)):
            if bound is None:
                found.append(other.view(1, 1, 1, 1))
            elif bound.shape[1] == 1:
                found.append(bound[:, :, None, None])
            else:
                place = position[:, 0, :, 0].clamp(0, self.keys - 1)
                size = torch.broadcast_shapes(place.shape[:1], bound.shape[:1])[0]
                picked = bound.expand(size, -1).gather(1, place.expand(size, -1))
                found.append(picked[:, None, :, None])
        return found[0], found[1]

    def _host(self, bound: Tensor | None, position: Ints, other: int) -> Ints:
        if bound is None:
            return np.full(len(position), other)
        values = bound[0].cpu().numpy()
        return np.asarray(values[np.clip(position, 0, len(values) - 1)])


@lru_cache(maxsize=1 << 14)
def _listed(
    x: BlockLayout, heads: range, start: int, end: int, keys: int, first: int, last: int
) -> tuple[Tensor, bool] | None:
    """`Blocks.columns` for rows of one document."""
    begin = start + x.tokens
    blocks = max(-(-(end - begin) // x.block), 1)
    low, high = ((p - begin) // x.block for p in (first, last - 1))
    low, high = min(low, blocks - 1), min(high, blocks - 1)
    if not x.causal and (low < 0 or low < x.first or high >= blocks - x.last):
        return None
    rows = np.arange(max(low, 0), max(high, 0) + 1)
    window = np.arange(rows[0] - x.side, rows[-1] + (0 if x.causal else x.side) + 1)
    parts = [window, np.arange(min(x.first, blocks)), np.arange(max(blocks - x.last, 0), blocks)]
    if x.random:
        parts.append(x.random_blocks(heads, blocks)[:, rows].ravel())
    seen = np.unique(np.concatenate(parts))
    seen = seen[(seen > NOTHING) & (seen < blocks)]
    columns = np.concatenate([np.arange(start, begin), (begin + seen[:, None] * x.block + np.arange(x.block)).ravel()])
    columns = columns[(columns >= 0) & (columns < keys)]
    alike = low == high >= 0 and (x.random == 0 or len(heads) == 1)
    return torch.from_numpy(columns), alike


def document_bounds(segments_bm: Tensor) -> tuple[Tensor, Tensor]:
    """Where the run of equal segment numbers around each column begins and ends, [b, m] each."""
    m = segments_bm.shape[1]
    index = torch.arange(m, device=segments_bm.device).expand_as(segments_bm)
    new = torch.ones_like(segments_bm, dtype=torch.bool)
    new[:, 1:] = segments_bm[:, 1:] != segments_bm[:, :-1]
    start = torch.where(new, index, 0).cummax(dim=1).values
    last = torch.ones_like(new)
    last[:, :-1] = new[:, 1:]
    end = torch.where(last, index + 1, m).flip(1).cummin(dim=1).values.flip(1)
    return start, end


TERMS["blocks"] = Blocks
