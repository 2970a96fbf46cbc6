"""How the chunked kernel cuts a call into tiles: blocks of query rows, for some batch rows and heads, with the keys
that they may see.

Columns that no row of a tile sees are left out, and only columns that some row does not see are hidden. The widest
rows come first where attention is causal, so that buffers are made once.

Legend: b batch, h query heads, g key/value heads, r = h / g, n queries, m keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.attention.mask import Mask
from clearhead.attention.terms import Rows
from clearhead.kernels.rule import Hidden

SHORT = 4096  # keys up to which a sight is remembered, some tens of kilobytes each
WIDE = 16  # a tile is wide when it has so many times more columns than rows


@dataclass(frozen=True)
class Tile:
    """One tile: slices into batch, key/value heads, query heads and rows; its columns; what of them is hidden."""

    batch: slice
    groups: slice
    heads: slice
    rows: slice
    keys: slice | Tensor
    """[low, high), or the sorted columns of a block pattern."""
    index: int
    block: Rows
    hide: Hidden
    bias: Bias | None
    bias_gradients: list[Tensor]


@dataclass(frozen=True)
class _Sight:
    """What a block of rows sees."""

    keys: slice | Tensor
    block: Rows
    hide: Hidden


def tiles(
    sizes: tuple[int, int, int, int, int],
    mask: Mask,
    bias: Bias | None,
    gradients: list[Tensor],
    device: torch.device,
    *,
    rows: int,
    elements: int,
) -> Iterator[Tile]:
    """Tiles of up to `rows` rows and about `elements` scores, for sizes (b, h, g, n, m) and a resolved mask.

    Each block of rows reads keys and values, and adds to their gradients, once. Where it sees many, that costs more
    than the hidden half of a larger block on the diagonal, so blocks are twice as high there.
    """
    b, h, g, n, m = sizes
    if not b or not n:
        return
    low, high = mask.key_bounds(max(0, n - rows), n, m)
    if mask.blocks is None and high - low >= WIDE * rows:
        rows *= 2
    rows = max(1, min(rows, n))
    empty_possible = mask.may_have_empty_rows(n, m)
    alike = all(t.narrow(slice(0, 1), slice(0, 1)) is t for t in mask.terms) and isinstance(mask.resolved_offset(), int)
    known = alike and m <= SHORT and mask.blocks is None and not mask.tensors()
    code = mask.encode()[0] if known else ""
    index = 0
    for q0 in reversed(range(0, n, rows)):
        q1 = min(q0 + rows, n)
        low, high = mask.key_bounds(q0, q1, m)
        together = None
        if known:
            together = _known_sight(code, q0, q1, m, empty_possible, device)
        elif alike:
            together = _sight(mask, q0, q1, m, empty_possible, device)
        for batch, group in _lanes(b, g, mask, h // g, q1 - q0, high - low, elements):
            heads = slice(group.start * (h // g), group.stop * (h // g))
            index += 1
            sight = together
            if not alike:
                sight = _sight(mask.narrow(batch, heads), q0, q1, m, empty_possible, device)
            if sight is None:
                continue
            yield Tile(
                batch, group, heads, slice(q0, q1), sight.keys, index, sight.block, sight.hide,
                None if bias is None else bias.with_tensors(bias.narrow(bias.tensors(), batch, heads)),
                [] if bias is None or not gradients else bias.narrow(gradients, batch, heads),
            )  # fmt: skip


def _lanes(b: int, g: int, mask: Mask, r: int, rows: int, width: int, elements: int) -> Iterator[tuple[slice, slice]]:
    """Batch rows and key/value heads that go into one tile together."""
    blocks = mask.blocks
    width = width if blocks is None else min(width, blocks.width)
    scores = max(1, r * rows * width)
    groups = max(1, min(g, elements // scores))
    whole = groups == g
    if blocks is not None:  # one list of columns a tile: heads that draw alike, batch rows that stand alike
        groups = groups if blocks.heads_alike else 1
        whole = blocks.rows_alike and isinstance(mask.resolved_offset(), int)
    batches = max(1, min(b, elements // (groups * scores))) if whole else 1
    for b0 in range(0, b, batches):
        for g0 in range(0, g, groups):
            yield slice(b0, min(b0 + batches, b)), slice(g0, min(g0 + groups, g))


@lru_cache(maxsize=64)
def _known_sight(code: str, q0: int, q1: int, m: int, empty_possible: bool, device: torch.device) -> _Sight | None:
    """`_sight` of a mask that is told by text alone: the layers and steps of a model ask for the same few."""
    return _sight(Mask.decode(code, []), q0, q1, m, empty_possible, device)


def _sight(mask: Mask, q0: int, q1: int, m: int, empty_possible: bool, device: torch.device) -> _Sight | None:
    """What rows q0..q1-1 see; None when that is nothing."""
    query = torch.arange(q0, q1, device=device)
    keys, columns, pieces = _columns(mask, query, q0, q1, m)
    if not len(columns):
        return None
    block = Rows(query, columns, mask.resolved_offset(), listed=not isinstance(keys, slice))
    return _Sight(keys, block, Hidden(pieces, empty_possible))


def _columns(
    mask: Mask, query: Tensor, q0: int, q1: int, m: int
) -> tuple[slice | Tensor, Tensor, list[tuple[slice, Tensor]]]:
    """The columns that rows q0..q1-1 may see, as a slice or a list, and as numbers; and what they hide of them."""
    low, high = mask.key_bounds(q0, q1, m)
    device, blocks = query.device, mask.blocks
    listed = None if blocks is None or low == high else blocks.columns(*(q + mask.offset_range()[0] for q in (q0, q1)))
    if listed is None:
        keys: slice | Tensor = slice(low, high)
        columns = torch.arange(low, high, device=device)
    else:
        columns = listed[0].to(device)
        inside = torch.searchsorted(columns, torch.tensor([low, high], device=device)).tolist()
        keys = columns = columns[slice(*inside)]
        if listed[1]:  # every row sees every block that is listed
            mask = mask.without(blocks)
    sure_low, sure_high = mask.sure_bounds(q0, q1, m)
    # Places of the surely visible among the columns, which are sorted.
    if listed is None:
        first, last = max(sure_low, low) - low, min(sure_high, high) - low
    else:
        first, last = torch.searchsorted(columns, torch.tensor([sure_low, sure_high], device=device)).tolist()
    if first >= last:
        first = last = len(columns)
    pieces = []
    for begin, end in ((0, first), (last, len(columns))):
        if begin < end:
            seen = mask.visible(Rows(query, columns[begin:end], mask.resolved_offset()))
            if seen is not None:
                pieces.append((slice(begin, end), ~seen))
    return keys, columns, pieces
