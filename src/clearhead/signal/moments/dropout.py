"""Inverted dropout: each entry is 0 with probability p, else divided by 1 - p."""

from __future__ import annotations

from clearhead.signal.moments.domain import probability
from clearhead.signal.moments.types import GradientMoments, Moments


def dropout(x: Moments, p: float) -> Moments:
    """Return the moments behind dropout: mean and covariance stay, variance = (variance_x + p mean_x^2) / (1 - p).

    The token correlation falls, by 1 - p for a mean of 0: this is what holds deep stacks off rank
    collapse. `ValueError` unless 0 <= p < 1.
    """
    p = probability(p)
    return Moments(x.mean, (x.variance + p * x.mean**2) / (1.0 - p), x.covariance)


def dropout_backward(g: GradientMoments, p: float) -> GradientMoments:
    """Return the gradient before dropout: variance / (1 - p), covariance unchanged."""
    p = probability(p)
    return GradientMoments(g.variance / (1.0 - p), g.covariance)
