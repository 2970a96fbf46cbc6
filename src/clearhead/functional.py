"""Twins of `torch.nn.functional.scaled_dot_product_attention`: its signature, other attentions.

    from clearhead import functional as F
    out = F.laser_attention(q, k, v, is_causal=True)

Common to all: query [b, h, n, d], key [b, g, m, d], value [b, g, m, e] with h a multiple of g (grouped queries need no
flag; `enable_gqa` is accepted for the signature's sake). `attn_mask` is bool (True = attend) or additive float,
broadcastable to [b, h, n, m]; float entries at or below half the dtype's minimum count as invisible. `attn_mask` and
`is_causal` are combined (and). **`is_causal` is bottom-right aligned**: the last query sees every key, so a lone
decode query sees all of its past. PyTorch's own is top-left aligned; the two are equal when n = m. A query that sees
no key gives 0, never NaN.

For masks without an N x M tensor (windows, lengths, packed documents), biases with a structure, caches and extras use
`clearhead.attention.attend`, which these call.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.bias import DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.projection import projection_of
from clearhead.attention.selective import selective as selective
from clearhead.attention.spec import AttentionSpec, BigBird, Laser, Performer, SelfAdjust

__all__ = [
    "bigbird_attention",
    "laser_attention",
    "performer_attention",
    "selective",
    "self_adjust_attention",
    "softmax_attention",
]


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """softmax(scale * Q K^T + mask) V. Returns [b, h, n, e]; see the top of this file for the arguments."""
    return _twin(AttentionSpec(), query, key, value, attn_mask, dropout_p, is_causal, scale)


def laser_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """LASER (arXiv 2411.03493): log(softmax(scale * Q K^T + mask) exp(V)), log and exp elementwise.

    Right for any values: a spread that float32 cannot hold is computed in float64, and past that term by term (see
    `attention/laser.py`). `dropout_p > 0` raises `ValueError`: dropped rows do not sum to 1.
    """
    return _twin(AttentionSpec(read=Laser()), query, key, value, attn_mask, dropout_p, is_causal, scale)


def self_adjust_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    form: str = "range",
    detach_extrema: bool = False,
) -> Tensor:
    """Self-Adjust Softmax (arXiv 2502.18277): r(x) softmax(x) V with x the scores; `form` picks r.

    "product" x; "min_shift" x - min x; "minmax" (x - min x) / (max x - min x); "range" (the paper's normalised default)
    (x - min(x_min, 0)) / (max(x_max, 0) - min(x_min, 0)). Extrema are over a query's visible keys; 1e-10 is added to
    the denominator. Dropout, if any, acts on the product. Whether gradients flow through the extrema
    (`detach_extrema`) decides whether the paper's gradient property holds under "range"; see
    `attention/self_adjust.py`. Do not detach them under "minmax" where a query sees a single key, as the first one of a
    causal call does: such a row's weight is 0 / 1e-10, whose derivative is 1e10.
    """
    spec = AttentionSpec(weights=SelfAdjust(form, detach_extrema))
    return _twin(spec, query, key, value, attn_mask, dropout_p, is_causal, scale)


def bigbird_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    block_size: int = 64,
    global_blocks: int = 2,
    window_blocks: int = 3,
    random_blocks: int = 3,
    seed: int = 0,
) -> Tensor:
    """BigBird (arXiv 2007.14062): softmax(scale * Q K^T + mask) V over global, window and random blocks of keys.

    Bidirectional: the first and last block see and are seen by all. Causal, which the paper has not: the first blocks
    are seen by all later ones, and random blocks lie in the past. Each head draws random blocks of its own, fixed by
    `seed`; a block counts once, however often it is named. Cost and memory are linear in length. Other mechanisms on
    the same pattern: `attend(..., "laser+bigbird")`. An `attn_mask` tensor is N x M by itself: say padding with
    `attend(..., mask=Mask.key_range(start, end))`, which also anchors the blocks at the first valid token.
    """
    pattern = BigBird(block_size, global_blocks, window_blocks, random_blocks, seed)
    return _twin(AttentionSpec(pattern=pattern), query, key, value, attn_mask, dropout_p, is_causal, scale)


def performer_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    features: int = 256,
    kernel: str = "softmax",
    projection: Tensor | Literal[False] | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Performer (arXiv 2009.14794): phi(q).phi(k) / sum as weights, phi random features of q and k, linear in length.

    `kernel`: "softmax", "hyperbolic", "trigonometric" estimate exp(scale * q.k), "regularized" a smaller kernel, "relu"
    one of its own. `features` counts random projections. `projection` None: drawn from a fixed seed, or by `generator`;
    a tensor [features, d] or [h, features, d]: used as it is; False: none (relu only; the paper's own generalised
    attention, which also leaves queries and keys unscaled, is scale=1).

    There are no scores, so of masks only those of keys are taken, bool [b|1, 1, 1, m], beside `is_causal`; others and
    `dropout_p > 0` raise `ValueError`. See `attention/performer.py`.
    """
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        raise ValueError(
            "performer_attention: it never makes a score to add a float mask to; give a bool mask of keys [b, 1, 1, m]"
        )
    choice = Performer(kernel, features)
    if generator is not None:
        if projection is not None:
            raise ValueError("performer_attention: give a projection or a generator to draw one, not both")
        projection = projection_of(choice, query.shape[-1], generator=generator).to(query.device)
    spec = AttentionSpec(weights=choice)
    return _twin(spec, query, key, value, attn_mask, dropout_p, is_causal, scale, projection)


def _twin(
    spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, dropout_p: float, is_causal: bool,
    scale: float | None, projection: Tensor | Literal[False] | None = None,
) -> Tensor:  # fmt: skip
    mask, bias = Mask.causal() if is_causal else Mask(), None
    if attn_mask is not None:
        seen, bias = _split(attn_mask)
        mask = mask & seen
    return attend(q, k, v, spec, mask=mask, bias=bias, scale=scale, dropout_p=dropout_p, projection=projection).out


def _split(attn_mask: Tensor) -> tuple[Mask, DenseBias | None]:
    """Visibility and, for a float mask, the values that are added where something is seen."""
    if attn_mask.dim() > 4:
        raise ValueError(f"attn_mask: expected at most 4 dimensions [b, h, n, m], got shape {tuple(attn_mask.shape)}")
    full = attn_mask[(None,) * (4 - attn_mask.dim())] if attn_mask.dim() < 4 else attn_mask
    if full.dtype == torch.bool:
        return Mask.dense(full), None
    if not full.is_floating_point():
        raise TypeError(f"attn_mask: expected bool (True = attend) or float (added to scores), got {attn_mask.dtype}")
    seen = full > torch.finfo(full.dtype).min / 2
    return Mask.dense(seen), DenseBias(torch.where(seen, full, 0.0))
