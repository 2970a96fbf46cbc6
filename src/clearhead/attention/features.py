"""The random-feature kernel written out, N x M: what the reference and the measurements read.

Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d head dim, r features.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clearhead.kernels.features import make_map

ELEMENTS = 1 << 22  # terms of a block of rows


def kernel_scores(
    kernel: str, projection: Tensor, q_bhnd: Tensor, k_bgmd: Tensor, scale: float, visible: Tensor
) -> Tensor:
    """log phi(q).phi(k), [b, h, n, m], each a log-sum-exp over features, so that nothing underflows.

    Trigonometric: phi(q).phi(k) itself, which may be negative, each row up to a positive factor.
    """
    times = q_bhnd.shape[1] // k_bgmd.shape[1]
    features = make_map(kernel, projection, q_bhnd.dtype)
    x, y = q_bhnd * math.sqrt(scale), k_bgmd.repeat_interleave(times, dim=1) * math.sqrt(scale)
    if not features.positive:
        (a, _), (b, level) = features(x), features(y)
        seen = level.unsqueeze(2).masked_fill(~visible, -math.inf)
        top = seen.detach().amax(dim=-1, keepdim=True)
        return (a @ b.mT) * (seen - top.masked_fill(top == -math.inf, 0.0)).exp()
    log_a, log_b = features.log(x).unsqueeze(3), features.log(y).unsqueeze(2)
    step = max(1, ELEMENTS // max(1, log_b.numel()))
    blocks = [torch.logsumexp(part + log_b, dim=-1) for part in log_a.split(step, dim=2)]
    return torch.cat(blocks, dim=2) if blocks else x.new_zeros(*x.shape[:3], y.shape[2])
