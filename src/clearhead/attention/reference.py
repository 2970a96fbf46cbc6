"""The dense truth: every choice of the algebra in a few readable lines, in float64 if asked.

Written for reading and for checking the fast paths, not for speed: it makes the whole N x M matrix, and for LASER even
N x M x D. Half precision is computed in float32. Shapes: b batch, h query heads, g key/value heads, n queries, m keys,
d head dim.

A mechanism that has no fast path still runs, here: register its formula with `@dense_weights(MyChoice)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.attention.call import float64_available
from clearhead.attention.features import kernel_scores
from clearhead.attention.mask import Mask
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.spec import AttentionSpec, Laser, Performer, SelfAdjust, Softmax, Weights
from clearhead.attention.terms import Rows

# (choice, scores [b,h,n,m] finite, visible [b,h,n,m] bool) -> weights [b,h,n,m], exactly 0 where not visible
DenseWeights = Callable[[Any, Tensor, Tensor], Tensor]
DENSE_WEIGHTS: dict[type[Weights], DenseWeights] = {}

EPS = 1e-10  # in the denominator of Self-Adjust only


def dense_weights(choice: type[Weights]) -> Callable[[DenseWeights], DenseWeights]:
    """Decorator: the dense formula of a weights choice."""

    def add(formula: DenseWeights) -> DenseWeights:
        DENSE_WEIGHTS[choice] = formula
        return formula

    return add


@dense_weights(Softmax)
def softmax_weights(choice: Softmax, scores: Tensor, visible: Tensor) -> Tensor:
    """s_i = exp(x_i) / sum_j exp(x_j) over visible keys; a row that sees nothing is 0."""
    some = visible.any(dim=-1, keepdim=True)
    hidden = scores.masked_fill(~visible, float("-inf")).masked_fill(~some, 0.0)
    return hidden.softmax(dim=-1).masked_fill(~visible, 0.0)


@dense_weights(SelfAdjust)
def self_adjust_weights(choice: SelfAdjust, scores: Tensor, visible: Tensor) -> Tensor:
    """r(x) * softmax(x), with the row's extrema over visible keys; forms as in `attention/self_adjust.py`."""
    s = softmax_weights(Softmax(), scores, visible)
    if not scores.shape[-1]:
        return s  # no keys, so no extrema
    some = visible.any(dim=-1, keepdim=True)
    low = scores.masked_fill(~visible, float("inf")).amin(-1, keepdim=True).masked_fill(~some, 0.0)
    high = scores.masked_fill(~visible, float("-inf")).amax(-1, keepdim=True).masked_fill(~some, 0.0)
    if choice.detach_extrema:
        low, high = low.detach(), high.detach()
    x = scores.masked_fill(~visible, 0.0)
    if choice.form == "product":
        r = x
    elif choice.form == "min_shift":
        r = x - low
    elif choice.form == "minmax":
        r = (x - low) / (high - low + EPS)
    else:
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        r = (x - low) / (high - low + EPS)
    return r * s


@dense_weights(Performer)
def performer_weights(choice: Performer, scores: Tensor, visible: Tensor) -> Tensor:
    """phi(q).phi(k) / sum over visible keys. `scores` are those of `kernel_scores`: logs of the kernel, whose softmax
    this is; the trigonometric kernel has no log, and is divided by its sum, which may be negative."""
    if choice.rows_sum_to_one:
        return softmax_weights(Softmax(), scores, visible)
    some = visible.any(dim=-1, keepdim=True)
    kernel = scores.masked_fill(~visible, 0.0)
    return kernel / kernel.sum(dim=-1, keepdim=True).masked_fill(~some, 1.0)


def laser_read(log_a_bhnm: Tensor, visible_bhnm: Tensor, v_bhmd: Tensor) -> Tensor:
    """O = log(sum_k A_k exp(V_k)), as a log-sum-exp over keys for each channel: right for any values."""
    some_bhn1 = visible_bhnm.any(dim=-1, keepdim=True)
    out_bhnd = torch.logsumexp(laser_terms(log_a_bhnm, visible_bhnm, v_bhmd), dim=-2)
    return out_bhnd.masked_fill(~some_bhn1, 0.0)


def laser_terms(log_a_bhnm: Tensor, visible_bhnm: Tensor, v_bhmd: Tensor) -> Tensor:
    """log A + V, [b, h, n, m, d]: -inf for hidden keys, finite in rows that see nothing."""
    some_bhn1 = visible_bhnm.any(dim=-1, keepdim=True)
    log_a = log_a_bhnm.masked_fill(~visible_bhnm, float("-inf")).masked_fill(~some_bhn1, 0.0)
    return log_a.unsqueeze(-1) + v_bhmd.unsqueeze(-3)


def scores_of(q_bhnd: Tensor, k_bgmd: Tensor, bias: Bias | None, rows: Rows, scale: float) -> Tensor:
    """Scaled scores plus bias, [b, h, n', m']; grouped queries share their key head."""
    k_bhmd = k_bgmd.repeat_interleave(q_bhnd.shape[1] // k_bgmd.shape[1], dim=1)
    scores = q_bhnd @ k_bhmd.mT * scale
    return scores if bias is None else scores + bias.block(rows).to(scores.dtype)


def visible_scores(
    q_bhnd: Tensor,
    k_bgmd: Tensor,
    mask: Mask,
    bias: Bias | None,
    scale: float,
    rows: Rows,
    weights: Weights | None = None,
    projection: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores in working precision and visibility, both [b, h, n', m'], for a block of rows (all that `q_bhnd` has).

    With a performer's weights and projection: `kernel_scores`.
    """
    dtype = working_dtype(q_bhnd.dtype)
    if isinstance(weights, Performer) and not weights.rows_sum_to_one and float64_available(q_bhnd.device):
        dtype = torch.float64  # sums with signs nearly cancel
    q, k = q_bhnd.to(dtype), k_bgmd.to(dtype)
    seen = mask.visible(rows)
    everything = torch.ones((), dtype=torch.bool, device=q.device)
    visible = (everything if seen is None else seen).expand(*q.shape[:3], k.shape[2])
    if isinstance(weights, Performer) and projection is not None:
        return kernel_scores(weights.kernel, projection, q, k, scale, visible), visible
    return scores_of(q, k, bias, rows, scale), visible


def log_weights(choice: Weights, scores: Tensor, visible: Tensor) -> Tensor:
    """Log of the weights; what is hidden may hold anything. For softmax and performer without the underflow of exp:
    LASER can lift a weight of e^-200 with a value of 300."""
    if isinstance(choice, Softmax | Performer):
        some = visible.any(dim=-1, keepdim=True)
        return scores.masked_fill(~visible, float("-inf")).masked_fill(~some, 0.0).log_softmax(dim=-1)
    weights = DENSE_WEIGHTS[type(choice)](choice, scores, visible)
    return weights.clamp_min(torch.finfo(weights.dtype).tiny).log()


@without_autocast
def reference_attention(
    q_bhnd: Tensor,
    k_bgmd: Tensor,
    v_bgmd: Tensor,
    spec: AttentionSpec,
    mask: Mask,
    bias: Bias | None,
    scale: float,
    dropout_p: float = 0.0,
    projection: Tensor | None = None,
) -> Tensor:
    """Attention as written on paper; `mask` is resolved and holds the spec's pattern. Returns [b, h, n, d]."""
    n, m, device = q_bhnd.shape[2], k_bgmd.shape[2], q_bhnd.device
    if m == 0:  # nobody sees anything; a zero that the graph still passes through
        return (q_bhnd.sum(dim=-1, keepdim=True) * 0.0).expand(*q_bhnd.shape[:3], v_bgmd.shape[-1])
    rows = Rows(torch.arange(n, device=device), torch.arange(m, device=device), mask.resolved_offset())
    scores, visible = visible_scores(q_bhnd, k_bgmd, mask, bias, scale, rows, spec.weights, projection)
    v_bhmd = v_bgmd.to(scores.dtype).repeat_interleave(q_bhnd.shape[1] // v_bgmd.shape[1], dim=1)
    if isinstance(spec.read, Laser):
        out = laser_read(log_weights(spec.weights, scores, visible), visible, v_bhmd)
    else:
        weights = DENSE_WEIGHTS[type(spec.weights)](spec.weights, scores, visible)
        out = torch.dropout(weights, dropout_p, train=dropout_p > 0.0) @ v_bhmd
    return out.to(q_bhnd.dtype)
