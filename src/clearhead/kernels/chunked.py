"""Tiled attention on any device: memory linear in length, any weights with a tile rule, any mask and bias.

A tile is a block of query rows of some batch rows and heads, with every key that those rows may see; columns that no
row of it sees are skipped, and only columns that some row does not see are masked. Nothing of size N x M is kept: the
backward pass makes the scores again. Holding whole rows, a tile needs no running maximum, and row statistics such as
Self-Adjust's extrema come for free.

Registered through `torch.library`, so compiled graphs hold it as one operator. Masks and biases cross that border as
text and tensors (`Mask.encode`, `Bias.tensors`). That border costs about half a millisecond a call, so eager calls on
plain tensors do without it (`_Eager`): the same tiles under an `autograd.Function`.

Legend: b batch, h query heads, g key/value heads, r = h / g, n queries, m keys, d head dim of queries and keys, e of
values, c rows of a tile, w its columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from clearhead.attention.bias import Bias, read_bias
from clearhead.attention.mask import Mask
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.spec import AttentionSpec, Weights
from clearhead.kernels.rule import TILE_RULES, Scratch, TileRule
from clearhead.kernels.tiles import Tile, tiles

ROWS = 64  # rows of a tile; twice as many where rows are long, see `tiles`
ELEMENTS = 1 << 18  # scores in a tile, about: fewer and larger tiles cost fewer calls, and the shared cache holds them
PLAIN = (Tensor, torch.nn.Parameter)  # what is neither fake nor a subclass with rules of its own


class _Call:
    """The arguments of one call, in working precision, with grouped views; makes the scores of a tile.

    Queries are scaled, and everything is contiguous, once and not tile by tile.
    """

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, weights: Weights, mask: Mask, bias: Bias | None, scale: float,
        dropout_p: float, seed: Tensor,
    ) -> None:  # fmt: skip
        dtype = working_dtype(q.dtype)
        self.q = (q.to(dtype) * scale).contiguous()
        self.k, self.v = k.to(dtype).contiguous(), v.to(dtype).contiguous()
        self.rule: TileRule = TILE_RULES[type(weights)](weights)
        self.mask, self.bias = mask, bias
        self.scale, self.dropout_p = scale, dropout_p
        self.seed = int(seed) if dropout_p > 0.0 else 0
        self.scratch = Scratch("tiles")

    @classmethod
    def told(
        cls, q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor], bias: str,
        bias_tensors: list[Tensor], scale: float, dropout_p: float, seed: Tensor,
    ) -> _Call:  # fmt: skip
        """The call of an operator, which takes text and tensors only."""
        weights, seen = AttentionSpec.parse(spec).weights, Mask.decode(mask, mask_tensors)
        return cls(q, k, v, weights, seen, read_bias(bias, bias_tensors) if bias else None, scale, dropout_p, seed)

    def tiles(self, gradients: list[Tensor]) -> Iterator[Tile]:
        b, h, n, _ = self.q.shape
        sizes = (b, h, self.k.shape[1], n, self.k.shape[2])
        return tiles(sizes, self.mask, self.bias, gradients, self.q.device, rows=ROWS, elements=ELEMENTS)

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

    def product(self, name: str, q_tile: Tensor, k_tile: Tensor, tile: Tile) -> Tensor:
        """Every row of a tile with every column, [b, h, c, w], in the buffer of that name."""
        lanes, rows, columns = q_tile.shape[0], q_tile.shape[1], k_tile.shape[1]
        x = torch.bmm(q_tile, k_tile.mT, out=self.scratch.take(name, (lanes, rows, columns), q_tile))
        return x.view(tile.batch.stop - tile.batch.start, -1, tile.rows.stop - tile.rows.start, columns)

    def scores(self, q_tile: Tensor, k_tile: Tensor, tile: Tile) -> Tensor:
        """Scores of a tile, [b, h, c, w]."""
        x = self.product("scores", q_tile, k_tile, tile)
        return x if tile.bias is None else x.add_(tile.bias.block(tile.block))

    def keep(self, like: Tensor, tile: Tile) -> Tensor | None:
        """Dropout's factors: 0 or 1 / (1 - p), drawn from the call's seed and the tile's number, so repeatable."""
        if self.dropout_p == 0.0:
            return None
        generator = torch.Generator(device=like.device).manual_seed((self.seed + 0x9E3779B9 * tile.index) % (1 << 63))
        kept = torch.rand(like.shape, generator=generator, device=like.device, dtype=torch.float32) >= self.dropout_p
        return kept.to(like.dtype).mul_(1.0 / (1.0 - self.dropout_p) if self.dropout_p < 1.0 else 0.0)


@without_autocast
def _read(call: _Call) -> Tensor:
    """The output [b, h, n, e] in working precision (float64, else float32)."""
    out = call.q.new_zeros(*call.q.shape[:3], call.v.shape[-1])
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


@without_autocast
def _gradients(call: _Call, d_out: Tensor, out: Tensor, bias_tensors: Sequence[Tensor]) -> list[Tensor]:
    """[d q, d k, d v] in working precision, then the gradients of `bias_tensors`."""
    d_out = d_out.to(call.q.dtype).contiguous()
    delta_bhn1 = (d_out * out).sum(dim=-1, keepdim=True)
    dq, dk, dv = torch.zeros_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
    bias_gradients = [torch.zeros_like(t) for t in bias_tensors]
    for tile in call.tiles(bias_gradients):
        q_tile, k_tile = call.query_part(call.q, tile), call.key_part(call.k, tile)
        d_out_tile = call.query_part(d_out, tile)
        x = call.scores(q_tile, k_tile, tile)
        gradient_w = call.product("gradient", d_out_tile, call.key_part(call.v, tile), tile)
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
            d_out_tile = d_out_tile * factor.view(*d_out_tile.shape[:2], 1)
        part = torch.bmm(dx_tile, k_tile).view(*dx.shape[:3], -1)
        torch.mul(part, call.scale, out=dq[tile.batch, tile.heads, tile.rows])
        _accumulate(dk, tile, dx_tile, q_tile)
        _accumulate(dv, tile, w_tile, d_out_tile)
    return [dq, dk, dv, *bias_gradients]


@torch.library.custom_op("clearhead::chunked_attention", mutates_args=())
def chunked_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor], bias: str,
    bias_tensors: list[Tensor], scale: float, dropout_p: float, seed: Tensor,
) -> Tensor:  # fmt: skip
    """Return the output [b, h, n, e] in working precision (float64, else float32)."""
    return _read(_Call.told(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed))


@chunked_forward.register_fake
def _(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1], dtype=working_dtype(q.dtype))


@torch.library.custom_op("clearhead::chunked_attention_backward", mutates_args=())
def chunked_backward(
    d_out: Tensor, out: Tensor, q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor],
    bias: str, bias_tensors: list[Tensor], scale: float, dropout_p: float, seed: Tensor, want_bias: bool,
) -> list[Tensor]:  # fmt: skip
    """Return [d q, d k, d v] in working precision, then the gradients of the bias's tensors if wanted."""
    call = _Call.told(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, dropout_p, seed)
    return _gradients(call, d_out, out, bias_tensors if want_bias else [])


def _accumulate(target_bgme: Tensor, tile: Tile, rows_by_keys: Tensor, rows_by_dim: Tensor) -> None:
    """target[tile's keys] += rows_by_keys^T rows_by_dim, without a temporary where the layout allows."""
    part = target_bgme[tile.batch, tile.groups]
    if not isinstance(tile.keys, slice):
        update = torch.bmm(rows_by_keys.mT, rows_by_dim)
        part.index_add_(2, tile.keys, update.unflatten(0, part.shape[:2]))
        return
    part = part[:, :, tile.keys]
    if part.shape[0] == 1 or part.shape[1] == target_bgme.shape[1]:  # batch and heads are one run: add in the product
        part.flatten(0, 1).baddbmm_(rows_by_keys.mT, rows_by_dim)
    else:
        part += torch.bmm(rows_by_keys.mT, rows_by_dim).view(part.shape)


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


class _Eager(torch.autograd.Function):
    """The operator's work without its border: mask and bias stay what they are."""

    @staticmethod
    def forward(ctx, q, k, v, weights, mask, bias, scale, dropout_p, seed, *bias_tensors):  # type: ignore[no-untyped-def]
        # With `setup_context` in its place torch would look up this function's signature at each call, 60 us.
        out = _read(_Call(q, k, v, weights, mask, bias, scale, dropout_p, seed))
        # The mask's tensors are not read from there again: they are saved so that writing into them is noticed.
        ctx.save_for_backward(q, k, v, out, seed, *bias_tensors, *mask.tensors())
        ctx.rest = weights, mask, bias, scale, dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out):  # type: ignore[no-untyped-def]
        q, k, v, out, seed, *tensors = ctx.saved_tensors
        weights, mask, bias, scale, dropout_p = ctx.rest
        bias_tensors = [] if bias is None else tensors[: len(bias.tensors())]
        want_bias = any(ctx.needs_input_grad[9:])
        call = _Call(q, k, v, weights, mask, bias, scale, dropout_p, seed)
        dq, dk, dv, *d_bias = _gradients(call, d_out, out, bias_tensors if want_bias else [])
        bias_result = d_bias if want_bias else [None for _ in bias_tensors]
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, None, None, *bias_result


def chunked_attention(
    q_bhnd: Tensor, k_bgmd: Tensor, v_bgme: Tensor, spec: AttentionSpec, mask: Mask, bias: Bias | None, scale: float,
    dropout_p: float,
) -> Tensor:  # fmt: skip
    """Tiled attention, mean read; `mask` is resolved and holds the pattern. Output in working precision."""
    if dropout_p > 0.0:
        seed = torch.randint(0, 1 << 62, (), dtype=torch.int64)
    else:
        seed = torch.zeros((), dtype=torch.int64)
    learned = [] if bias is None else bias.tensors()
    if not torch.compiler.is_compiling() and all(type(t) in PLAIN for t in (q_bhnd, k_bgmd, v_bgme, *learned)):
        out: Tensor = _Eager.apply(q_bhnd, k_bgmd, v_bgme, spec.weights, mask, bias, scale, dropout_p, seed, *learned)
        return out
    code, mask_tensors = mask.encode()
    return chunked_forward(
        q_bhnd, k_bgmd, v_bgme, spec.text, code, mask_tensors, "" if bias is None else bias.text, learned, scale,
        dropout_p, seed,
    )  # fmt: skip
