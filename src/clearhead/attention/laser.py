"""LASER attention (Duvvuri & Dhillon, arXiv 2411.03493): read in log-sum-exp form, channel by channel.

    O_ij = log sum_k A_ik exp(V_kj) = m_j + log sum_k A_ik exp(V_kj - m_j)

m_j is the largest visible value of channel j (the paper's log-weighted-sum-exp trick, Algorithm 1; detached, since the
result does not depend on it). The middle is ordinary attention on exp(V - m), so the fused kernels serve it.

What the paper does not say, and floating point demands:

* One large value in the future makes exp(V - m) underflow for everything before it. So the spread of each channel is
  measured first. While M exp(spread) stays below eps / tiny of float32 (a spread of about 64 at 1k keys) nothing is
  lost; past that the same is computed in float64 (about 665); past that, term by term as logsumexp(log A + V), exact
  and slow.
* Half precision: log turns the relative rounding of exp(V) into an absolute error, so everything is in float32.
* Padding is left out of m; a query that sees no key gives 0.
* Attention dropout is refused: rows would not sum to 1, and the shift by m would not cancel.

Gradients, with the posterior p_ikj = A_ik exp(V_kj) / sum_l A_il exp(V_lj):  dO_ij/dS_ik = p_ikj - A_ik,
dO_ij/dV_kj = p_ikj. Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d head dim, e value dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from clearhead.attention.bias import Bias, read_bias
from clearhead.attention.call import Call, float64_available
from clearhead.attention.mask import Mask
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.reference import laser_terms, log_weights, visible_scores
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.terms import Rows
from clearhead.kernels.chunked import chunked_backward, chunked_forward


@without_autocast
def laser_by_kernel(call: Call, attention: Callable[[Call], Tensor]) -> Tensor:
    """LASER on top of `attention`, a fused mean-read kernel, while the values' spread allows; else `laser_tiled`.

    Reads one number on the host, so compiled graphs go straight to `laser_tiled`, which decides inside the operator.
    """
    dtype = working_dtype(call.q.dtype)
    shift, spread = _shift_and_spread(call.v.detach(), call.unseen)
    if not (spread.item() <= safe_spread(dtype, call.k.shape[2])):
        return laser_tiled(call)
    read = attention(
        call.with_tensors(call.q.to(dtype), call.k.to(dtype), _shifted_exp(call.v, shift, call.unseen, dtype))
    )
    return _log_and_shift(read, shift, call.some_visible(), dtype).to(call.q.dtype)


def laser_tiled(call: Call) -> Tensor:
    """LASER on the chunked kernel as one operator: any mask and bias, any values, linear memory (but see `_exact`)."""
    code, mask_tensors = call.mask.encode()
    bias, bias_tensors = ("", []) if call.bias is None else (call.bias.text, call.bias.tensors())
    out = laser_forward(call.q, call.k, call.v, call.spec.text, code, mask_tensors, bias, bias_tensors, call.scale)
    return out.to(call.q.dtype)


def safe_spread(dtype: torch.dtype, keys: int) -> float:
    """Largest spread of a channel at which sum_k A exp(V - m) >= exp(-spread) / keys keeps its full precision."""
    info = torch.finfo(dtype)
    return math.log(info.eps) - math.log(info.tiny) - math.log(max(keys, 1))


def _shift_and_spread(v: Tensor, unseen: Tensor | None) -> tuple[Tensor, Tensor]:
    """m [b, g, 1, e], the largest visible value of each channel, and the largest spread over channels (a scalar)."""
    if v.shape[2] == 0 or v.numel() == 0:
        return v.new_zeros(*v.shape[:2], 1, v.shape[3]), v.new_zeros(())
    if unseen is None:
        high, low = v.amax(dim=2, keepdim=True), v.amin(dim=2, keepdim=True)
        return high, (high - low).amax()
    high = v.masked_fill(unseen, float("-inf")).amax(dim=2, keepdim=True)
    low = v.masked_fill(unseen, float("inf")).amin(dim=2, keepdim=True)
    nothing = unseen.all(dim=2, keepdim=True)
    return high.masked_fill(nothing, 0.0), (high - low).masked_fill(nothing, 0.0).amax()


def _shifted_exp(v: Tensor, shift: Tensor, unseen: Tensor | None, dtype: torch.dtype) -> Tensor:
    u = v.to(dtype) - shift.to(dtype)
    return u.exp() if unseen is None else u.masked_fill(unseen, 0.0).exp()  # padding must not overflow either


def _log_and_shift(read: Tensor, shift_bg1e: Tensor, some: Tensor | None, dtype: torch.dtype) -> Tensor:
    """log(read) + m, with the shift repeated for grouped query heads and rows without keys set to 0."""
    if some is not None:
        read = torch.where(some, read, 1.0)
    out = read.log() + shift_bg1e.to(dtype).repeat_interleave(read.shape[1] // shift_bg1e.shape[1], dim=1)
    return out if some is None else torch.where(some, out, 0.0)


# ---- one operator for any values: compiled graphs, spreads past the limit, masks that only the chunked kernel takes
# ----


class _Plan:
    """What forward and backward share: the decoded arguments, and the precision that the values' spread asks for."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor], bias: str,
        bias_tensors: list[Tensor], scale: float,
    ) -> None:  # fmt: skip
        self.mask = Mask.decode(mask, mask_tensors)
        self.bias: Bias | None = read_bias(bias, bias_tensors) if bias else None
        self.unseen = self.mask.unseen_keys(k.shape[2], k.shape[1], k.device)
        self.shift, spread = _shift_and_spread(v, self.unseen)
        working, size = working_dtype(q.dtype), float(spread)
        candidates = [working, torch.float64] if float64_available(q.device) else [working]
        self.dtype = next((t for t in candidates if size <= safe_spread(t, k.shape[2])), None)
        self.q, self.k, self.v, self.scale = q, k, v, scale
        self.rest = (mask, mask_tensors, bias, bias_tensors, scale, 0.0, torch.zeros((), dtype=torch.int64))
        self.spec = AttentionSpec.parse(spec)
        n, m = q.shape[2], k.shape[2]
        empty = self.mask.may_have_empty_rows(n, m)
        self.some = self.mask.some_visible(n, m, q.device).unsqueeze(-1) if empty else None

    def read(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(q, k, exp(v - m), sum_k A exp(V - m)) in the plan's precision."""
        assert self.dtype is not None
        q, k = self.q.to(self.dtype), self.k.to(self.dtype)
        u = _shifted_exp(self.v, self.shift, self.unseen, self.dtype)
        return q, k, u, chunked_forward(q, k, u, self.spec.text, *self.rest)


@torch.library.custom_op("clearhead::laser", mutates_args=())
@without_autocast
def laser_forward(
    q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor], bias: str,
    bias_tensors: list[Tensor], scale: float,
) -> Tensor:  # fmt: skip
    """Return the output [b, h, n, e] in working precision (float64, else float32)."""
    plan = _Plan(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale)
    if plan.dtype is None:
        return _exact(plan)
    read = plan.read()[3]
    return _log_and_shift(read, plan.shift, plan.some, plan.dtype).to(working_dtype(q.dtype))


@laser_forward.register_fake
def _(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale):  # type: ignore[no-untyped-def]
    return q.new_empty(*q.shape[:3], v.shape[-1], dtype=working_dtype(q.dtype))


@torch.library.custom_op("clearhead::laser_backward", mutates_args=())
@without_autocast
def laser_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, spec: str, mask: str, mask_tensors: list[Tensor], bias: str,
    bias_tensors: list[Tensor], scale: float, want_bias: bool,
) -> list[Tensor]:  # fmt: skip
    """Return [d q, d k, d v] in working precision, then the gradients of the bias's tensors if wanted."""
    plan = _Plan(q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale)
    working = working_dtype(q.dtype)
    if plan.dtype is None:
        return _exact_backward(plan, d_out.to(working), bias_tensors if want_bias else [])
    q_, k_, u, read = plan.read()
    d_read = d_out.to(plan.dtype) / (read if plan.some is None else torch.where(plan.some, read, 1.0))
    if plan.some is not None:
        d_read = torch.where(plan.some, d_read, 0.0)
    dq, dk, du, *d_bias = chunked_backward(d_read, read, q_, k_, u, plan.spec.text, *plan.rest, want_bias)
    dv = du.mul_(u)
    if plan.unseen is not None:
        dv = dv.masked_fill(plan.unseen, 0.0)
    return [dq.to(working), dk.to(working), dv.to(working), *d_bias]


@laser_backward.register_fake
def _(d_out, q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, want_bias):  # type: ignore[no-untyped-def]
    gradients = [torch.empty_like(t, dtype=working_dtype(q.dtype)) for t in (q, k, v)]
    return gradients + ([torch.empty_like(t) for t in bias_tensors] if want_bias else [])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale = inputs
    ctx.save_for_backward(q, k, v, *mask_tensors, *bias_tensors)
    ctx.rest = (spec, mask, bias, scale, len(mask_tensors))


def _backward(ctx, d_out):  # type: ignore[no-untyped-def]
    spec, mask, bias, scale, masks = ctx.rest
    q, k, v, *tensors = ctx.saved_tensors
    mask_tensors, bias_tensors = tensors[:masks], tensors[masks:]
    want_bias = any(t.requires_grad for t in bias_tensors)
    dq, dk, dv, *d_bias = laser_backward(d_out, q, k, v, spec, mask, mask_tensors, bias, bias_tensors, scale, want_bias)
    bias_result = d_bias if want_bias else [None] * len(bias_tensors)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, [None] * masks, None, bias_result, None


laser_forward.register_autograd(_backward, setup_context=_setup_context)


# ---- term by term: spreads that not even float64 holds ----


def _exact_blocks(plan: _Plan):  # type: ignore[no-untyped-def]
    """Yield (rows, weights, log weights + values [b, h, c, m, e]) for blocks of rows, about 64 MiB at a time."""
    b, h, n, _ = plan.q.shape
    m, e = plan.v.shape[2:]
    step = max(1, (1 << 24) // max(1, b * h * m * e))
    v = plan.v.to(working_dtype(plan.q.dtype)).repeat_interleave(h // plan.v.shape[1], dim=1)
    keys = torch.arange(m, device=plan.q.device)
    for first in range(0, n, step):
        rows = slice(first, min(first + step, n))
        block = Rows(torch.arange(rows.start, rows.stop, device=plan.q.device), keys, plan.mask.resolved_offset())
        scores, visible = visible_scores(plan.q[:, :, rows], plan.k, plan.mask, plan.bias, plan.scale, block)
        log_a = log_weights(plan.spec.weights, scores, visible)
        a = log_a.exp().masked_fill(~visible, 0.0)
        yield rows, block, a, laser_terms(log_a, visible, v), visible.any(dim=-1, keepdim=True)


def _exact(plan: _Plan) -> Tensor:
    out = plan.q.new_empty(*plan.q.shape[:3], plan.v.shape[-1], dtype=working_dtype(plan.q.dtype))
    for rows, _, _, terms, some in _exact_blocks(plan):
        out[:, :, rows] = torch.logsumexp(terms, dim=-2).masked_fill(~some, 0.0)
    return out


def _exact_backward(plan: _Plan, d_out: Tensor, bias_tensors: list[Tensor]) -> list[Tensor]:
    g, h = plan.k.shape[1], plan.q.shape[1]
    q, k = plan.q.to(d_out.dtype), plan.k.to(d_out.dtype)
    k_h = k.repeat_interleave(h // g, dim=1)
    dq = torch.zeros_like(q)
    dk_h, dv_h = torch.zeros_like(k_h), d_out.new_zeros(*k_h.shape[:3], d_out.shape[-1])
    d_bias = [torch.zeros_like(t) for t in bias_tensors]
    for rows, block, a, terms, some in _exact_blocks(plan):
        g_out = d_out[:, :, rows].masked_fill(~some, 0.0)
        tilted = torch.softmax(terms, dim=-2) * g_out.unsqueeze(-2)  # p_ikj dO_ij
        dx = tilted.sum(-1) - a * g_out.sum(-1, keepdim=True)
        dv_h += tilted.sum(dim=2)
        dq[:, :, rows] = dx @ k_h * plan.scale
        dk_h += dx.mT @ q[:, :, rows] * plan.scale
        if d_bias and plan.bias is not None:
            plan.bias.accumulate(d_bias, block, dx)
    dk, dv = (t.unflatten(1, (g, -1)).sum(dim=2) for t in (dk_h, dv_h))
    return [dq, dk, dv, *d_bias]
