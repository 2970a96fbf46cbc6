"""BigBird's blocks (arXiv 2007.14062, section 2 and appendix D): which key blocks a query block sees.

A document is cut into blocks of `block` tokens, counted from its first valid token (after its global tokens, if any).
A query block sees the *union* of

    global   the first and last blocks (bidirectional), the first blocks (causal)
    window   the blocks around it; causal: its own and the ones before
    random   `random` blocks drawn without replacement from the rest, uniformly; causal: from the past

and global tokens and, where the pattern is bidirectional, global blocks see everything. Where we differ from the
released code, on purpose: blocks are a set, so that none counts twice; random blocks reach the whole sequence
(`released` keeps them in the first 1,024 tokens, as its plan for pretraining did) and are the same in training and
evaluation; a short input is dense by itself, because the union is; the causal form, which the paper has not, sees
earlier tokens only.

This file decides and draws; the mask term is `attention/blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Ints = npt.NDArray[np.int64]
RELEASED_REACH = 1024
"""Tokens from which the released plan draws its random blocks."""
NOTHING = -1


@dataclass(frozen=True)
class BlockLayout:
    """The numbers of a pattern; `seed`, head and row decide the random blocks."""

    block: int
    global_blocks: int
    window: int
    random: int
    seed: int
    tokens: int
    """Global tokens before the first block (0: none)."""
    released: bool
    causal: bool

    @property
    def first(self) -> int:
        """Global blocks at the start."""
        return self.global_blocks if self.causal else (self.global_blocks + 1) // 2

    @property
    def last(self) -> int:
        """Global blocks at the end."""
        return 0 if self.causal else self.global_blocks // 2

    @property
    def side(self) -> int:
        """Window blocks before the own one."""
        return self.window - 1 if self.causal else (self.window - 1) // 2

    def random_blocks(self, heads: range, blocks: int) -> Ints:
        """[heads, blocks, random]: the random blocks of each row of a document of so many blocks; -1 for none."""
        return _table(self, heads.start, heads.stop, blocks)


@lru_cache(maxsize=256)
def _table(layout: BlockLayout, first_head: int, last_head: int, blocks: int) -> Ints:
    heads, rows = (torch.arange(*ends, device="cpu") for ends in ((first_head, last_head), (0, blocks)))
    drawn = drawn_blocks(layout, heads[:, None], rows, torch.tensor(blocks, device="cpu"))
    table = np.full((len(heads), blocks, layout.random), NOTHING)
    for draw, found in enumerate(drawn):
        table[:, :, draw] = found.numpy()
    return table


def drawn_blocks(x: BlockLayout, heads: Tensor, row: Tensor, blocks: Tensor) -> list[Tensor]:
    """The random blocks of rows of documents of so many blocks, one tensor a draw, all broadcast together; -1 for none.

    Floyd's sampling without replacement, as tensor operations, so that a compiled graph may hold it. Under a causal
    pattern a row's draws depend on (seed, head, row) alone, so a longer document keeps them.
    """
    # Candidates are [low, before) and [after, high): all but the window, between the global blocks.
    low = blocks.clamp_max(x.first)
    before = torch.maximum(row - x.side, low)
    high = row if x.causal else torch.maximum(blocks - x.last, low)
    if x.released:
        high = high.clamp_max(max(RELEASED_REACH // x.block, 1))
    after = before if x.causal else torch.maximum(row + x.side + 1, low)
    left = (torch.minimum(before, high) - low).clamp_min(0)
    right = torch.zeros_like(left) if x.causal else (high - after).clamp_min(0)
    places: list[Tensor] = []
    for draw in range(x.random):
        # A place in [0, count - r + draw]; one that is taken is replaced by the last of them. With fewer candidates
        # than draws, those of limit >= 0 are as many as the candidates and take every place.
        limit = left + right - x.random + draw
        place = (_uniform(x.seed, heads, row, draw) * (limit + 1)).long()
        for taken in places:
            place = torch.where(place == taken, limit, place)
        places.append(torch.where(limit >= 0, place, NOTHING))
    return [torch.where(p == NOTHING, NOTHING, torch.where(p < left, p + low, p - left + after)) for p in places]


def _uniform(seed: int, heads: Tensor, row: Tensor, draw: int) -> Tensor:
    """Numbers in [0, 1), a pure function of the arguments: the finishing steps of splitmix64 over a mixed key.

    int64 wraps as uint64 does; only a shift must not carry the sign along.
    """

    def shift(x: Tensor, by: int) -> Tensor:
        return (x >> by) & ((1 << (64 - by)) - 1)

    x = torch.full_like(row, _wrapped((seed & 0xFFFFFFFF) * 0x9E3779B97F4A7C15))
    for part in (heads, torch.full_like(row, draw), row):
        x = (x ^ part) + _wrapped(0x9E3779B97F4A7C15)
        x = (x ^ shift(x, 30)) * _wrapped(0xBF58476D1CE4E5B9)
        x = (x ^ shift(x, 27)) * _wrapped(0x94D049BB133111EB)
        x = x ^ shift(x, 31)
    return shift(x, 11).double() * 2.0**-53


def _wrapped(x: int) -> int:
    """A 64-bit number as the int64 of the same bits."""
    return (x & (2**64 - 1)) - (2**64 if x & 2**63 else 0)


def key_blocks(layout: BlockLayout, row: int, head: int, blocks: int) -> list[int]:
    """The key blocks that one query block sees, sorted: the pattern as a list, for reading and for tests."""
    if not layout.causal and (row < layout.first or row >= blocks - layout.last):
        return list(range(blocks))
    seen = {*range(min(layout.first, blocks)), *range(max(blocks - layout.last, 0), blocks)}
    seen |= set(range(max(row - layout.side, 0), row + 1 if layout.causal else min(row + layout.side + 1, blocks)))
    seen |= set(layout.random_blocks(range(head, head + 1), blocks)[0, row].tolist()) - {NOTHING}
    return sorted(block for block in seen if not layout.causal or block <= row)


@lru_cache(maxsize=256)
def mean_keys(layout: BlockLayout, context: int) -> float:
    """Keys that a query sees, averaged over `context` positions of one document; all heads see equally many."""
    size, tokens = layout.block, min(layout.tokens, context)
    blocks = -(-(context - tokens) // size)
    widths = [min(size, context - tokens - block * size) for block in range(blocks)]
    total = tokens * (tokens + 1) / 2 if layout.causal else float(tokens * context)
    for row, width in enumerate(widths):
        seen = sum(widths[block] for block in key_blocks(layout, row, 0, blocks)) + tokens
        # Of its own block a causal row sees half on average.
        total += width * (seen - (width - 1) / 2 if layout.causal else seen)
    return total / context
