"""Tiled attention on any device: memory linear in length, any weights with a tile rule, any mask and bias.

A tile is a block of query rows of some batch rows and heads, with every key that those rows may see; columns that no
row of it sees are skipped, and only columns that some row does not see are masked. Nothing of size N x M is kept: the
backward pass makes the scores again. Holding whole rows, a tile needs no running maximum, and row statistics such as
Self-Adjust's extrema come for free.

Registered through `torch.library`, so compiled graphs hold it as one operator. Masks and biases cross that border as
text and tensors (`Mask.encode`, `Bias.tensors`).

Legend: b batch, h query heads, g key/value heads, r = h / g, n queries, m keys, d head dim of queries and keys, e of
values, c rows of a tile, w its columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from clearhead.attention.bias import Bias, read_bias
from clearhead.attention.mask import Mask
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.terms import Rows
from clearhead.kernels.rule import TILE_RULES, Hidden, TileRule

ROWS = 64  # rows of a tile
ELEMENTS = 1 << 18  # scores in a tile, about: a few such buffers stay in a core's cache


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


def _tiles(
    b: int,
    h: int,
    g: int,
    n: int,
    m: int,
    mask: Mask,
    bias: Bias | None,
    gradients: list[Tensor],
    device: torch.device,
) -> Iterator[Tile]:
    r = h // g
    rows = max(1, min(ROWS, n))
    blocks = mask.blocks
    width = m if blocks is None else min(m, blocks.width)
    groups = max(1, min(g, ELEMENTS // max(1, r * rows * width)))
    batches = max(1, min(b, ELEMENTS // max(1, h * rows * width))) if groups == g else 1
    if blocks is not None:  # one list of columns a tile: heads that draw alike, batch rows that stand alike
        groups = groups if blocks.heads_alike else 1
        alike = blocks.rows_alike and isinstance(mask.resolved_offset(), int)
        batches = max(1, min(b, ELEMENTS // max(1, r * groups * rows * width))) if alike else 1
    empty_possible = mask.may_have_empty_rows(n, m)
    index = 0
    for b0 in range(0, b, batches):
        batch = slice(b0, min(b0 + batches, b))
        for g0 in range(0, g, groups):
            group = slice(g0, min(g0 + groups, g))
            heads = slice(group.start * r, group.stop * r)
            part = mask.narrow(batch, heads)
            bias_part = None if bias is None else bias.with_tensors(bias.narrow(bias.tensors(), batch, heads))
            gradient_part = [] if bias is None or not gradients else bias.narrow(gradients, batch, heads)
            for q0 in range(0, n, rows):
                q1 = min(q0 + rows, n)
                index += 1
                query = torch.arange(q0, q1, device=device)
                keys, columns, pieces = _columns(part, query, q0, q1, m)
                if not len(columns):
                    continue
                block = Rows(query, columns, part.resolved_offset())
                yield Tile(
                    batch, group, heads, slice(q0, q1), keys, index, block, Hidden(pieces, empty_possible), bias_part,
                    gradient_part,
                )  # fmt: skip


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


class _Call:
    """The arguments of one call, in working precision, with grouped views; makes the scores of a tile."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor], bias: str,
        bias_tensors: list[Tensor], scale: float, dropout_p: float, seed: Tensor,
    ) -> None:  # fmt: skip
        dtype = working_dtype(q.dtype)
        self.q, self.k, self.v = q.to(dtype), k.to(dtype), v.to(dtype)
        weights = AttentionSpec.parse(spec).weights
        self.rule: TileRule = TILE_RULES[type(weights)](weights)
        self.mask = Mask.decode(mask, mask_tensors)
        self.bias = read_bias(bias, bias_tensors) if bias else None
        self.scale, self.dropout_p = scale, dropout_p
        self.seed = int(seed) if dropout_p > 0.0 else 0
        self.b, self.h, self.n, _ = q.shape
        self.g, self.m = k.shape[1], k.shape[2]

    def tiles(self, gradients: list[Tensor]) -> Iterator[Tile]:
        return _tiles(self.b, self.h, self.g, self.n, self.m, self.mask, self.bias, gradients, self.q.device)

    def query_part(self, x: Tensor, tile: Tile) -> Tensor:
        """Rows of a query-shaped tensor as [b*g, r*c, .]: grouped queries share one product with their key head."""
        part = x[tile.batch, tile.heads, tile.rows]
        groups = tile.groups.stop - tile.groups.start
        return part.unflatten(1, (groups, -1)).flatten(0, 1).flatten(1, 2)

    def key_part(self, x: Tensor, tile: Tile) -> Tensor:
        """Columns of a key-shaped tensor as [b*g, w, .]; a view of a slice of one batch row or of all heads."""
        part = x[tile.batch, tile.groups]
        part = part[:, :, tile.keys] if isinstance(tile.keys, slice) else part.index_select(2, tile.keys)
        return part.flatten(0, 1)

    def scores(self, q_tile: Tensor, k_tile: Tensor, tile: Tile) -> Tensor:
        """Scores of a tile, [b, h, c, w]."""
        rows = tile.rows.stop - tile.rows.start
        product = torch.bmm(q_tile * self.scale, k_tile.transpose(1, 2))
        x = product.view(tile.batch.stop - tile.batch.start, -1, rows, product.shape[-1])
        return x if tile.bias is None else x.add_(tile.bias.block(tile.block))

    def keep(self, like: Tensor, tile: Tile) -> Tensor | None:
        """Dropout's factors: 0 or 1 / (1 - p), drawn from the call's seed and the tile's number, so repeatable."""
        if self.dropout_p == 0.0:
            return None
        generator = torch.Generator(device=like.device).manual_seed((self.seed + 0x9E3779B9 * tile.index) % (1 << 63))
        kept = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32) >= self.dropout_p
        return kept.to(like.dtype).mul_(1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0)


@torch.library.custom_op("clearhead::chunked_attention", mutates_args=())
@without_autocast
def chunked_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor], bias: str,
    bias_tensors: list[Tensor], scale: float, dropout_p: float, seed: Tensor,
) -> Tensor:  # fmt: skip
    """Return the output [b, h, n, e] in working precision (float64, else float32)."""
    call = _Call(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed)
    out = call.q.new_zeros(*q.shape[:3], v.shape[-1])
    for tile in call.tiles([]):
        w, factor = call.rule.weights(
            call.scores(call.query_part(call.q, tile), call.key_part(call.k, tile), tile), tile.hide
        )
        keep = call.keep(w, tile)
        if keep is not None:
            w.mul_(keep)
        v_tile = call.key_part(call.v, tile)
        part = torch.bmm(w.view(v_tile.shape[0], -1, w.shape[-1]), v_tile).view(*w.shape[:3], -1)
        out[tile.batch, tile.heads, tile.rows] = part if factor is None else part.mul_(factor)
    return out


@chunked_forward.register_fake
def _(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1], dtype=working_dtype(q.dtype))


@torch.library.custom_op("clearhead::chunked_attention_backward", mutates_args=())
@without_autocast
def chunked_backward(
    d_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor],
    bias: str, bias_tensors: list[Tensor], scale: float, dropout_p: float, seed: Tensor, want_bias: bool,
) -> list[Tensor]:  # fmt: skip
    """Return [d q, d k, d v] in working precision, then the gradients of the bias's tensors if wanted."""
    call = _Call(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed)
    d_out = d_out.to(call.q.dtype)
    delta_bhn1 = (d_out * out).sum(dim=-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
    bias_gradients = [torch.zeros_like(t) for t in bias_tensors] if want_bias else []
    for tile in call.tiles(bias_gradients):
        q_tile, k_tile = call.query_part(call.q, tile), call.key_part(call.k, tile)
        d_out_part = d_out[tile.batch, tile.heads, tile.rows]
        d_out_tile = call.query_part(d_out, tile)
        x = call.scores(q_tile, k_tile, tile)
        gradient_w = torch.bmm(d_out_tile, call.key_part(call.v, tile).transpose(1, 2)).view(x.shape)
        keep = call.keep(x, tile)
        if keep is not None:
            gradient_w.mul_(keep)
        dx, w, factor = call.rule.backward(x, tile.hide, gradient_w, delta_bhn1[tile.batch, tile.heads, tile.rows])
        if keep is not None:
            w = w * keep
        if tile.bias_gradients and tile.bias is not None:
            tile.bias.accumulate(tile.bias_gradients, tile.block, dx)
        dx_tile = dx.view(k_tile.shape[0], -1, dx.shape[-1])
        w_tile = w.view(dx_tile.shape)
        if factor is not None:
            groups = tile.groups.stop - tile.groups.start
            d_out_tile = (d_out_part * factor).unflatten(1, (groups, -1)).flatten(0, 1).flatten(1, 2)
        d_query = torch.bmm(dx_tile, k_tile).mul_(call.scale).view(*dx.shape[:3], -1)
        dq[tile.batch, tile.heads, tile.rows] = d_query
        _accumulate(dk, tile, dx_tile, q_tile * call.scale)
        _accumulate(dv, tile, w_tile, d_out_tile)
    return [dq, dk, dv, *bias_gradients]


def _accumulate(target_bgmd: Tensor, tile: Tile, rows_by_keys: Tensor, rows_by_dim: Tensor) -> None:
    """target[tile's keys] += rows_by_keys^T rows_by_dim, without a temporary where the layout allows."""
    part = target_bgmd[tile.batch, tile.groups]
    if not isinstance(tile.keys, slice):
        update = torch.bmm(rows_by_keys.transpose(1, 2), rows_by_dim)
        part.index_add_(2, tile.keys, update.unflatten(0, part.shape[:2]))
        return
    part = part[:, :, tile.keys]
    if part.shape[0] == 1:  # a view of three dimensions: accumulate inside the product
        part[0].baddbmm_(rows_by_keys.transpose(1, 2), rows_by_dim)
    else:
        part += torch.bmm(rows_by_keys.transpose(1, 2), rows_by_dim).view(part.shape)


@chunked_backward.register_fake
def _(d_out, out, q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed, want_bias):  # type: ignore[no-untyped-def]  # fmt: skip
    gradients = [torch.empty_like(t, dtype=working_dtype(q.dtype)) for t in (q, k, v)]
    return gradients + ([torch.empty_like(t) for t in bias_tensors] if want_bias else [])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed = inputs
    ctx.save_for_backward(q, k, v, output, seed, *mask_tensors, *bias_tensors)
    ctx.texts = (spec, mask, bias)
    ctx.numbers = (scale, dropout_p)
    ctx.counts = (len(mask_tensors), len(bias_tensors))


def _backward(ctx, d_out):  # type: ignore[no-untyped-def]
    q, k, v, out, seed, *rest = ctx.saved_tensors
    masks, biases = ctx.counts
    mask_tensors, bias_tensors = rest[:masks], rest[masks:]
    spec, mask, bias = ctx.texts
    scale, dropout_p = ctx.numbers
    want_bias = any(t.requires_grad for t in bias_tensors)
    dq, dk, dv, *d_bias = chunked_backward(
        d_out, out, q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed, want_bias
    )
    bias_result = d_bias if want_bias else [None] * biases
    return (
        dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, [None] * masks, None, bias_result, None, None, None
    )  # fmt: skip


chunked_forward.register_autograd(_backward, setup_context=_setup_context)


def chunked_attention(
    q_bhnd: Tensor, k_bgmd: Tensor, v_bgme: Tensor, spec: AttentionSpec, mask: Mask, bias: Bias | None, scale: float,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """Tiled attention, mean read; `mask` is resolved and holds the pattern. Output in working precision."""
    code, mask_tensors = mask.encode()
    if dropout_p > 0.0:
        seed = torch.randint(0, 1 << 62, (), dtype=torch.int64)
    else:
        seed = torch.zeros((), dtype=torch.int64)
    return chunked_forward(
        q_bhnd, k_bgmd, v_bgme, spec.text, code, mask_tensors, "" if bias is None else bias.text,
        [] if bias is None else bias.tensors(), scale, dropout_p, seed,
    )  # fmt: skip
