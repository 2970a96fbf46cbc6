"""Softmax over L logits: exact integrals, beside the published expansions (arXiv 2403.09635). Imports no torch.

Logits are normal, of variance sigma^2, correlated by r with each other. Only t = (1 - r) sigma^2 counts, because
softmax does not see what all logits share. In `Moments` the "tokens" are here the L logits of a row. With P = E sum
a^2 and J = diag(a) - a a^T, the variance of a weight and the gradient variance by a logit over sigma_g^2 are

    ours           P / L - 1 / L^2                                                    E ||J||_F^2 / L
    approximate    (e^t - 1) / L^2                                                    e^t / L^2
    finer          v = (e^tau - 1) e^{2 tau} / ((L-1) e^t + 1)^2,  tau = t L / (L-1)          v + 1 / L^2

The published forms are those of DeepScaleLM (arXiv 2403.09635), read in the authors' code. They hold for weak
logits; ours for any. The mean of a weight is 1 / L always.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from clearhead.signal.moments.laplace import LARGEST_SPREAD, row_statistics
from clearhead.signal.moments.rows import JACOBIAN, SQUARES, row_table
from clearhead.signal.moments.types import GradientMoments, Moments


def softmax(logits: Moments, count: int) -> Moments:
    """Moments of the weights of a row of `count` logits. Weights sum to 1, hence covariance = -variance / (count - 1).

    Exact to 1e-5 for a within-row deviation up to 20; beyond, what is left beside the winner is taken to fall as 1/s.
    """
    squares, _ = _row(math.sqrt(_own(logits)), count)
    return _row_of_weights(max(squares / count - 1.0 / count**2, 0.0), count)


def softmax_backward(g: GradientMoments, logits: Moments, count: int) -> GradientMoments:
    """Gradient by the logits, from the gradient `g` by the weights; what all weights' gradients share drops out.

    The gradients by the logits of a row sum to 0.
    """
    own = g.variance - g.covariance
    variance = own * _row(math.sqrt(_own(logits)), count)[1] / count
    return GradientMoments(variance, -variance / (count - 1) if count > 1 else 0.0)


def published_softmax(logits: Moments, count: int, *, finer: bool = False) -> Moments:
    """The published variance, approximate or finer.

    Raises `ValueError` for fewer than 2 logits in the finer form.
    """
    return _row_of_weights(_published_variance(logits, count, finer), count)


def published_softmax_backward(
    g: GradientMoments, logits: Moments, count: int, *, finer: bool = False
) -> GradientMoments:
    """The published gradient variance; its covariance is not published and set by sum 0, as ours."""
    weights = _published_variance(logits, count, finer)
    variance = g.variance * (weights + 1.0 / count**2 if finer else math.exp(_own(logits)) / count**2)
    return GradientMoments(variance, -variance / (count - 1) if count > 1 else 0.0)


def _own(logits: Moments) -> float:
    return max(logits.variance - logits.covariance, 0.0)


@lru_cache(maxsize=1024)
def _row(spread: float, count: int) -> tuple[float, float]:
    """E sum a^2 and E ||diag(a) - a a^T||_F^2."""
    if count < 1:
        raise ValueError(f"softmax: expected at least 1 logit, got {count}")
    if count == 1:
        return 1.0, 0.0
    if spread > LARGEST_SPREAD:
        columns = row_table(count, False).rows(np.array([spread]))[0]
        return float(columns[SQUARES]), float(columns[JACOBIAN])
    row = row_statistics(spread, np.array([float(count)]))
    squares = float(row.squares[0])
    return squares, max(squares - 2.0 * float(row.cubes[0]) + float(row.squares_squared[0]), 0.0)


def _row_of_weights(variance: float, count: int) -> Moments:
    return Moments(1.0 / count, variance, -variance / (count - 1) if count > 1 else 0.0)


def _published_variance(logits: Moments, count: int, finer: bool) -> float:
    t = _own(logits)
    if not finer:
        return (math.exp(t) - 1.0) / count**2
    if count < 2:
        raise ValueError("published_softmax: the finer form needs at least 2 logits")
    tau = t * count / (count - 1)
    return (math.exp(tau) - 1.0) * math.exp(2.0 * tau) / ((count - 1) * math.exp(t) + 1.0) ** 2
