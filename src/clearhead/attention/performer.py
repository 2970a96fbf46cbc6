"""Performer (FAVOR+, Choromanski et al., arXiv 2009.14794): attention with the kernel of random features.

    out_i = sum_j phi(x_i).phi(y_j) v_j / sum_j phi(x_i).phi(y_j),   x = sqrt(scale) q,  y = sqrt(scale) k

(eq. 4, 11). With scale = d^-1/2 that is the paper's d^-1/4 on both. phi estimates exp(x.y) without bias for `softmax`,
`hyperbolic` (Lemma 1) and `trigonometric`, a smaller kernel (SMREG) for `regularized`, and is a kernel of its own for
`relu`. The quotient is only consistent. The variance grows as exp(|x + y|^2): features help where norms are small.

Where we differ from the public code, on purpose:

* no epsilon in any feature but ReLU's, and none in a denominator: a positive map needs none;
* shifts are each key's own and a running maximum, so no future key touches the past (`kernels/linear.py`);
* padding enters neither sums nor shifts; a query that sees nothing gives 0;
* orthogonal blocks are Haar (`attention/projection.py`), and the draw is a function of seeds, not of the data.

Only key padding, causality and packed documents can hide keys, since no score ever exists.

Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d head dim of queries and keys, e of values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.attention.call import Call, float64_available
from clearhead.attention.laser import _log_and_shift, _shift_and_spread, _shifted_exp, safe_spread
from clearhead.attention.mask import Mask
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.projection import remembered_projection
from clearhead.attention.selective import Temperatures
from clearhead.attention.spec import Laser, Performer
from clearhead.attention.terms import Causal, Dense, KeyRange, Segments
from clearhead.kernels.features import MAPS, make_map
from clearhead.kernels.linear import CHUNK, Problem, solve, solve_backward

# ---- what a call may ask for ----


def refuse_performer(
    choice: Performer,
    dtype: torch.dtype,
    mask: Mask,
    bias: Bias | None,
    temperatures: Temperatures | None,
    scale: float | None,
    dropout_p: float,
) -> None:
    """Raise `ValueError` for what sums over features cannot do, with the reason."""
    if dtype == torch.float16 and not choice.rows_sum_to_one:
        raise ValueError(
            "performer refuses float16 with the trigonometric kernel: its denominators come near 0, and gradients "
            "leave the range of float16; use bfloat16 or float32"
        )
    if bias is not None:
        raise ValueError(
            "performer refuses a bias: it never makes a score to add it to (rotary positions do not need one)"
        )
    if dropout_p > 0.0:
        raise ValueError(
            "performer refuses attention dropout: it never makes the weights that would be dropped; use dropout_p=0 "
            "(drop out the layer's output instead)"
        )
    if scale is not None and not scale > 0.0:
        raise ValueError(f"performer: expected a scale above 0, whose root goes to queries and keys, got {scale}")
    if temperatures is not None and not (temperatures.query is temperatures.key is None):
        raise ValueError(
            "performer refuses a temperature on queries or keys: it does nothing to ReLU features and multiplies the "
            "variance of the others exponentially; give the value's alone (a model: temperature_on=value)"
        )
    if len(mask.find(Segments)) > 1:
        raise ValueError("performer takes one set of packed documents; combine the segment numbers into one")
    for term in mask.terms:
        fits = isinstance(term, KeyRange | Segments) or (isinstance(term, Causal) and term.prefix == 0)
        if not fits and not (isinstance(term, Dense) and term.mask.shape[1:3] == (1, 1)):
            raise ValueError(
                f"performer refuses a mask of kind {type(term).__name__.lower()}: it sums over features and never "
                "makes a score, so only key padding, plain causality and packed documents can hide keys; use softmax "
                "weights with such a mask"
            )


def projection_for(choice: Performer, query: Tensor, given: Tensor | Literal[False] | None) -> Tensor:
    """The rows for a call: given, drawn from the spec's seed, or none (the identity)."""
    h, d = query.shape[1], query.shape[3]
    if given is None:
        return _remembered(choice, d, str(query.device))
    if given is False:
        if choice.kernel != "relu":
            raise ValueError(f"projection=False: only relu features do without one, not {choice.kernel}")
        return torch.eye(d, dtype=working_dtype(query.dtype), device=query.device)
    if not isinstance(given, Tensor) or not given.is_floating_point():
        raise TypeError(f"projection: expected a floating point tensor, False or None, got {given!r}")
    if given.dim() not in (2, 3) or given.shape[-1] != d or given.shape[:-2] not in ((), (h,)) or given.shape[-2] < 1:
        raise ValueError(f"projection: expected [features, {d}] or [{h}, features, {d}], got {tuple(given.shape)}")
    return given.detach()


@torch.compiler.assume_constant_result
def _remembered(choice: Performer, d: int, device: str) -> Tensor:
    return remembered_projection(choice, d, device)


# ---- the masks, as problems of the kernel ----


@dataclass(frozen=True, eq=False)
class Part:
    """Some batch rows, queries and keys of a call that make one `Problem`."""

    rows: Tensor | None  # None: all
    queries: slice
    keys: slice
    offset: int
    segments: Tensor | None = None

    def batch(self, x: Tensor) -> Tensor:
        """The part's batch rows."""
        return x if self.rows is None else x.index_select(0, self.rows)


def parts(mask: Mask, n: int, m: int) -> Iterator[Part]:
    """Cut a call by offset and, where documents do not stand as `Problem` wants them, by document.

    Reads tensors on the host. Raises `ValueError` for a document in pieces.
    """
    causal, offset, segments = mask.is_causal, mask.resolved_offset(), mask.find(Segments)
    if segments and isinstance(segments[0], Segments):
        yield from _documents(segments[0], offset, causal, n, m)
    elif causal and isinstance(offset, Tensor):
        for value in offset.unique().tolist():
            yield Part((offset == value).nonzero().flatten(), slice(0, n), slice(0, m), value)
    else:
        yield Part(None, slice(0, n), slice(0, m), offset if causal and isinstance(offset, int) else m)


def _documents(told: Segments, offset: int | Tensor, causal: bool, n: int, m: int) -> Iterator[Part]:
    for numbers in {id(told.query): told.query, id(told.key): told.key}.values():
        for row in numbers:
            real = row[row >= 0]
            if len(real) and 1 + int((real[1:] != real[:-1]).sum()) != len(real.unique()):
                raise ValueError("performer: a packed document must stand in one piece; give its pieces other numbers")
    alike = told.query is told.key or (told.query.shape == told.key.shape and torch.equal(told.query, told.key))
    if causal and alike and isinstance(offset, int) and offset == 0:
        yield Part(None, slice(0, n), slice(0, m), 0, told.query)
        return
    alone = told.query.shape[0] == told.key.shape[0] == 1 and isinstance(offset, int)
    sizes = [told.query.shape[0], told.key.shape[0], *([] if isinstance(offset, int) else [offset.shape[0]])]
    for row in range(1 if alone else max(sizes)):
        own_q, own_k = (x[min(row, x.shape[0] - 1)] for x in (told.query, told.key))
        shift = offset if isinstance(offset, int) else int(offset[min(row, offset.shape[0] - 1)])
        rows = None if alone else torch.tensor([row], device=own_q.device)
        for number in own_q[own_q >= 0].unique().tolist():
            queries, keys = ((x == number).nonzero().flatten() for x in (own_q, own_k))
            if len(keys):
                (i0, i1), (j0, j1) = ((int(x[0]), int(x[-1]) + 1) for x in (queries, keys))
                yield Part(rows, slice(i0, i1), slice(j0, j1), shift + i0 - j0 if causal else m)


class _Plan:
    """What forward and backward share: the decoded arguments in the precision of the sums."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, kernel: str, laser: bool, mask: str,
        mask_tensors: list[Tensor], scale: float, chunk: int,
    ) -> None:  # fmt: skip
        self.mask = Mask.decode(mask, mask_tensors)
        self.sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2])
        m, g = k.shape[2], k.shape[1]
        self.unseen = self.mask.unseen_keys(m, g, k.device)
        self.working = self.dtype = working_dtype(q.dtype)
        if not MAPS[kernel].positive and float64_available(q.device):
            self.dtype = torch.float64  # sums with signs nearly cancel
        self.shift: Tensor | None = None
        values = v.to(self.dtype)
        if laser:
            self.shift, spread = _shift_and_spread(v, self.unseen)
            self.dtype = sums_dtype(self.working, float(spread), m, q.device)
            values = _shifted_exp(v, self.shift, self.unseen, self.dtype)
        root = math.sqrt(scale)
        self.q, self.k = q.to(self.dtype) * root, k.to(self.dtype) * root
        self.v, self.root, self.chunk = values, root, chunk
        self.v1 = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        self.map = make_map(kernel, projection, self.dtype)
        self.valid = None if self.unseen is None else ~self.unseen[:, 0, :, 0]
        told = self.mask.find(Segments)
        self.hidden = (told[0].query < 0)[:, None, :, None] if told and isinstance(told[0], Segments) else None

    def problems(self) -> Iterator[tuple[Part, Problem]]:
        b, h, _, n, m = self.sizes
        if min(b, h, n, m) == 0:
            return
        for part in parts(self.mask, n, m):
            q = self._grouped(part.batch(self.q)[:, :, part.queries])
            k, v1 = (part.batch(x)[:, :, part.keys] for x in (self.k, self.v1))
            valid = self.valid
            if valid is not None:
                valid = (valid if valid.shape[0] == 1 else part.batch(valid))[:, part.keys]
            segments = None if part.segments is None else part.segments.expand(q.shape[0], -1)
            yield part, Problem(q, k, v1, self.map, part.offset, valid, segments, self.chunk)

    def _grouped(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.sizes[2], -1))

    def read(self) -> tuple[Tensor, Tensor]:
        """The mean read of the values [b, h, n, e], and the denominators [b, h, n] (see `solve`)."""
        b, h, _, n, _ = self.sizes
        out, z = self.q.new_zeros(b, h, n, self.v.shape[-1]), self.q.new_zeros(b, h, n)
        for part, problem in self.problems():
            for target, x in zip((out, z), solve(problem), strict=True):
                _put(target, part, x.flatten(1, 2))
        return (out, z) if self.hidden is None else (out.masked_fill(self.hidden, 0.0), z)

    def backward(self, d_out: Tensor, out: Tensor, z: Tensor) -> list[Tensor]:
        """d q, d k, d v of the mean read."""
        d_out = d_out.to(self.dtype)
        if self.hidden is not None:
            d_out = d_out.masked_fill(self.hidden, 0.0)
        dq, dk, dv = torch.zeros_like(self.q), torch.zeros_like(self.k), torch.zeros_like(self.v)
        for part, problem in self.problems():
            mine = [self._grouped(part.batch(x)[:, :, part.queries]) for x in (d_out, out.to(self.dtype), z)]
            gradients = solve_backward(problem, *mine)
            _put(dq, part, gradients[0].flatten(1, 2))
            for target, x in zip((dk, dv), gradients[1:], strict=True):
                _put(target, part, x, keys=True)
        return [dq.mul_(self.root), dk.mul_(self.root), dv]

    def log(self, read: Tensor, z: Tensor) -> Tensor:
        """LASER's output of the mean read of exp(v - shift)."""
        assert self.shift is not None
        return _log_and_shift(read, self.shift, (z != 0.0).unsqueeze(-1), self.dtype)


def _put(target: Tensor, part: Part, x: Tensor, *, keys: bool = False) -> None:
    place = part.keys if keys else part.queries
    if part.rows is None:
        target[:, :, place] = x
    else:
        target[part.rows, :, place] = x


def sums_dtype(working: torch.dtype, spread: float, keys: int, device: torch.device) -> torch.dtype:
    """The precision in which sums of exp(v - max v) lose nothing at this spread of the values."""
    for dtype in [working, torch.float64] if float64_available(device) else [working]:
        if spread <= safe_spread(dtype, keys):
            return dtype
    raise ValueError(
        f"laser on performer: values spread over {spread:.0f} in one channel, more than sums of exp(values) can hold "
        f"(about {safe_spread(torch.float64, keys):.0f} in float64); scale the values down, or use laser on softmax"
    )


# ---- one operator ----


@torch.library.custom_op("clearhead::linear_attention", mutates_args=())
@without_autocast
def linear_forward(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, kernel: str, laser: bool, mask: str,
    mask_tensors: list[Tensor], scale: float, chunk: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output [b, h, n, e] and the denominators [b, h, n], in working precision (float64, else float32)."""
    plan = _Plan(q, k, v, projection, kernel, laser, mask, mask_tensors, scale, chunk)
    read, z = plan.read()
    return (plan.log(read, z) if laser else read).to(plan.working), z.to(plan.working)


@linear_forward.register_fake
def _(q, k, v, projection, kernel, laser, mask, mask_tensors, scale, chunk):  # type: ignore[no-untyped-def]
    dtype = working_dtype(q.dtype)
    return q.new_empty(*q.shape[:3], v.shape[-1], dtype=dtype), q.new_empty(q.shape[:3], dtype=dtype)


@torch.library.custom_op("clearhead::linear_attention_backward", mutates_args=())
@without_autocast
def linear_backward(
    d_out: Tensor, out: Tensor, z: Tensor, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, kernel: str,
    laser: bool, mask: str, mask_tensors: list[Tensor], scale: float, chunk: int,
) -> list[Tensor]:  # fmt: skip
    """Return [d q, d k, d v] in working precision."""
    plan = _Plan(q, k, v, projection, kernel, laser, mask, mask_tensors, scale, chunk)
    d_read = d_out.to(plan.dtype)
    if laser:  # the log has lost digits of what it read
        out, z = plan.read()
        some = (z != 0.0).unsqueeze(-1)
        d_read = torch.where(some, d_read / torch.where(some, out, 1.0), 0.0)
    dq, dk, dv = plan.backward(d_read, out, z)
    if laser:
        dv = dv.mul_(plan.v)
        if plan.unseen is not None:
            dv = dv.masked_fill(plan.unseen, 0.0)
    return [dq.to(plan.working), dk.to(plan.working), dv.to(plan.working)]


@linear_backward.register_fake
def _(d_out, out, z, q, k, v, projection, kernel, laser, mask, mask_tensors, scale, chunk):  # type: ignore[no-untyped-def]  # fmt: skip
    return [t.new_empty(t.shape, dtype=working_dtype(q.dtype)) for t in (q, k, v)]


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, projection, kernel, laser, mask, mask_tensors, scale, chunk = inputs
    ctx.save_for_backward(*output, q, k, v, projection, *mask_tensors)
    ctx.rest = (kernel, laser, mask, scale, chunk)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
    kernel, laser, mask, scale, chunk = ctx.rest
    out, z, q, k, v, projection, *mask_tensors = ctx.saved_tensors
    dq, dk, dv = linear_backward(d_out, out, z, q, k, v, projection, kernel, laser, mask, mask_tensors, scale, chunk)
    nothing = [None] * len(mask_tensors)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None, nothing, None, None


linear_forward.register_autograd(_backward, setup_context=_setup_context)


def performer_attention(call: Call, chunk: int = CHUNK) -> Tensor:
    """Serve a call, in chunks of any size (the result does not depend on it), or one step of a recurrent state."""
    weights, laser = call.spec.weights, isinstance(call.spec.read, Laser)
    assert isinstance(weights, Performer)
    assert call.projection is not None
    if call.sums is not None:
        features = make_map(weights.kernel, call.projection, call.sums.dtype)
        return call.sums.step(call, features, laser, chunk).to(call.q.dtype)
    code, mask_tensors = call.mask.encode()
    out, _ = linear_forward(
        call.q, call.k, call.v, call.projection, weights.kernel, laser, code, mask_tensors, call.scale, chunk
    )
    return out.to(call.q.dtype)
