"""Next-segment prediction: tell a pair that stands together from one that does not.

    L_NSP = mean softplus(-T(x, next)) + mean softplus(T(x, other))

Twice the binary cross-entropy with as many positives as negatives, and minus the Jensen-Shannon bound of mutual
information (Nowozin et al., arXiv 1606.00709, the GAN objective): the best T is the pointwise mutual information
log p(x, y) / (p(x) p(y)), where L_NSP = 2 log 2 - 2 JS. Lowering it raises a bound on JS, a relative of mutual
information, not of the KL divergence that mutual information is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def nsp_loss(next_b: Tensor, other_b: Tensor) -> Tensor:
    """Return L_NSP of the critic's scores, a scalar in nats; 2 log 2 = 1.386 for a critic that knows nothing."""
    _check(next_b, other_b)
    return F.softplus(-next_b).mean() + F.softplus(other_b).mean()


def nsp_accuracy(next_b: Tensor, other_b: Tensor) -> Tensor:
    """Return the share of pairs on the right side of 0, both kinds weighed alike; a score of 0 is half right."""
    _check(next_b, other_b)
    return (_right(next_b) + _right(-other_b)) / 2


def _right(score_b: Tensor) -> Tensor:
    return ((score_b > 0).double() + 0.5 * (score_b == 0).double()).mean()


def _check(next_b: Tensor, other_b: Tensor) -> None:
    if not torch.numel(next_b) or not torch.numel(other_b):
        raise ValueError("nsp: expected scores of at least one pair of each kind")
