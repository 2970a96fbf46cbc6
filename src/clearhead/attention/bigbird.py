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

This file draws the random blocks and imports no torch; the mask term is `attention/blocks.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

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
        return _random_blocks(self, heads.start, heads.stop, blocks)


@lru_cache(maxsize=256)
def _random_blocks(layout: BlockLayout, first_head: int, last_head: int, blocks: int) -> Ints:
    """Floyd's sampling without replacement, for all rows at once.

    Under a causal pattern a row's draw depends on (seed, head, row) alone, so a longer document keeps it.
    """
    row = np.arange(blocks)
    # Candidates are [low, before) and [after, high): all but the window, between the global blocks.
    low = np.minimum(layout.first, blocks)
    before = np.maximum(row - layout.side, low)
    high = row if layout.causal else np.full(blocks, max(blocks - layout.last, low))
    if layout.released:
        high = np.minimum(high, max(RELEASED_REACH // layout.block, 1))
    after = before if layout.causal else np.maximum(row + layout.side + 1, low)
    left = np.maximum(np.minimum(before, high) - low, 0)
    right = np.zeros_like(left) if layout.causal else np.maximum(high - after, 0)
    count = left + right
    chosen = np.full((last_head - first_head, blocks, layout.random), NOTHING, dtype=np.int64)
    for draw in range(layout.random):
        # The draw-th of r: a place in [0, count - r + draw]; one that is taken is replaced by the last of them.
        limit = count - layout.random + draw
        for head in range(first_head, last_head):
            picks = chosen[head - first_head]
            place = (_uniform(layout.seed, head, row, draw) * (limit + 1)).astype(np.int64)
            place = np.where((picks[:, :draw] == place[:, None]).any(axis=1), limit, place)
            picks[:, draw] = np.where(limit >= 0, place, NOTHING)
    # Fewer candidates than draws: all of them. The draws with limit >= 0 are `count` many and take every place.
    found = np.where(chosen < left[:, None], chosen + low, chosen - left[:, None] + after[:, None])
    return np.where(chosen == NOTHING, NOTHING, found)


def _uniform(seed: int, head: int, row: Ints, draw: int) -> npt.NDArray[np.float64]:
    """Numbers in [0, 1), a pure function of the arguments: the finishing steps of splitmix64 over a mixed key."""
    with np.errstate(over="ignore"):
        x = np.full(len(row), seed & 0xFFFFFFFF, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for part in (np.uint64(head), np.uint64(draw), row.astype(np.uint64)):
            x = (x ^ part) + np.uint64(0x9E3779B97F4A7C15)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return np.asarray((x >> np.uint64(11)).astype(np.float64) * 2.0**-53)


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
