"""LayerNorm and RMSNorm, forward and backward, to first order in 1 / width.

DeepScaleLM's code (arXiv 2403.09635) has the limit of large width, and for LayerNorm a token correlation r (1 - 1/d),
which is not 1 at r = 1. The corrections of order 1/d here are derived by us for Gaussian features that are independent
of each other and equal in law; they are 1 at r = 1. Features of unequal variance or mean follow the same limit with
other corrections. Tokens of unequal norms (rare rows, outlier positions) are outside the theory: the mean of 1 / x^2
is not 1 / mean of x^2.
"""

from __future__ import annotations

import math

from clearhead.errors import unknown
from clearhead.signal.moments.domain import checked
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import Norm

NARROWEST = 4
"""Widths below have no mean of 1 / variance."""


def normalise(x: Moments, width: int, norm: Norm) -> Moments:
    """Return what the norm makes of x: `layer_norm` or `rms_norm`, by `norm.kind`."""
    if norm.kind == "layer":
        return layer_norm(x, width, norm)
    if norm.kind == "rms":
        return rms_norm(x, width, norm)
    raise unknown("norm", norm.kind, ("layer", "rms"))


def normalise_backward(g: GradientMoments, x: Moments, width: int, norm: Norm) -> GradientMoments:
    """Return the gradient by the norm's input x, by `norm.kind`."""
    if norm.kind == "layer":
        return layer_norm_backward(g, x, width, norm)
    if norm.kind == "rms":
        return rms_norm_backward(g, x, width, norm)
    raise unknown("norm", norm.kind, ("layer", "rms"))


def layer_norm(x: Moments, width: int, norm: Norm) -> Moments:
    """Return the moments of gain * (x - m) / sqrt(s^2 + eps) + shift, m and s^2 over the `width` features of a token.

        mean = 0      variance = G s^2 / (s^2 + eps) + B      covariance = G r (1 - (1 - r^2) / (2 (d - 1))) [same] + B

    s^2, r: variance and centred correlation of x; G, B: mean squares of gain and shift; d the width. A mean that all
    features share is removed. A shift adds to every token alike. `ValueError` for a width below 4.
    """
    _, variance, r = checked(x)
    kept = norm.gain * _kept(variance, norm.eps)
    cosine = r * (1.0 - (1.0 - r * r) / (2.0 * (_wide(width) - 1)))
    return Moments(0.0, kept + norm.shift, kept * cosine + norm.shift)


def layer_norm_backward(g: GradientMoments, x: Moments, width: int, norm: Norm) -> GradientMoments:
    """Return the gradient by x.

        variance = G variance_g / (s^2 + eps) . (d - 2) / (d - 3)
        covariance = G covariance_g / (s^2 + eps) . (d - 2) / (d - 3) . (1 - 3 (1 - r^2) / (2 d))

    DeepScaleLM's G variance_g / s^2 in the limit. (d - 2) / d is what the two removed directions leave, d / (d - 3) the
    mean of 1 / s^2 over tokens; exact for Gaussian x. `g` is independent of x.
    """
    _, variance, r = checked(x)
    gain = norm.gain * (_wide(width) - 2) / (width - 3) / _positive(variance + norm.eps)
    return GradientMoments(gain * g.variance, gain * g.covariance * (1.0 - 1.5 * (1.0 - r * r) / width))


def layer_norm_feature_correlation(width: int) -> float:
    """Return -1 / (d - 1): the correlation between two features of a token, which sum to 0."""
    return -1.0 / (_wide(width) - 1)


def rms_norm(x: Moments, width: int, norm: Norm) -> Moments:
    """Return the moments of gain * x / sqrt(mean(x^2) + eps), the mean over the `width` features of a token.

    In the limit of large width (derived by us), q = s^2 + mu^2 + eps, mu the mean of x:

        mean = mu sqrt(G) / sqrt(q)        variance = G s^2 / q        covariance = G r s^2 / q

    To first order in 1/d, from the fluctuations of the two tokens' mean squares A_t, A_s and their product's mean C
    (delta method, derived by us): E C / sqrt(A_t A_s) for the raw covariance, E m / sqrt(A) for the mean; the second
    moment is exact. The gains are taken as equal (their mean is sqrt(G)); with unequal ones the second moment and the
    raw covariance, which the next map reads, still hold. A shift adds as in `layer_norm`.
    """
    mean, variance, r = checked(x)
    q = _positive(variance + mean**2 + norm.eps)
    spread = _Spread.of(mean, variance, r, _wide(width), q)
    second_moment = (variance + mean**2) / q
    centre = mean / math.sqrt(q) * (1.0 + 0.375 * spread.own - variance / (q * width))
    raw = (r * variance + mean**2) / q
    product = raw * (1.0 + 0.75 * spread.own + 0.25 * spread.between) - spread.with_product
    return Moments(
        mean=math.sqrt(norm.gain) * centre,
        variance=norm.gain * max(0.0, second_moment - centre**2) + norm.shift,
        covariance=norm.gain * (product - centre**2) + norm.shift,
    )


def rms_norm_backward(g: GradientMoments, x: Moments, width: int, norm: Norm) -> GradientMoments:
    """Return the gradient by x: variance and covariance times G / (s^2 + mu^2 + eps) in the limit.

    To first order in 1/d (derived by us) the variance has (1 - 1/d)(1 + Var A / q^2), one direction being removed, and
    the covariance (1 - (2 - R^2) / d) E q / sqrt(A_t A_s), R the raw correlation of x. `g` is independent of x.
    """
    mean, variance, r = checked(x)
    q = _positive(variance + mean**2 + norm.eps)
    spread = _Spread.of(mean, variance, r, _wide(width), q)
    raw = (r * variance + mean**2) / q
    own = norm.gain / q * (1.0 - 1.0 / width) * (1.0 + spread.own)
    between = norm.gain / q * (1.0 - (2.0 - raw**2) / width) * (1.0 + 0.75 * spread.own + 0.25 * spread.between)
    return GradientMoments(own * g.variance, between * g.covariance)


class _Spread:
    """Fluctuations of A = mean of x^2 over features, relative to q; each is of order 1/d."""

    def __init__(self, own: float, between: float, with_product: float) -> None:
        self.own = own
        """Var A_t / q^2."""
        self.between = between
        """Cov(A_t, A_s) / q^2."""
        self.with_product = with_product
        """Cov(A_t, mean of x_t x_s) / q^2."""

    @classmethod
    def of(cls, mean: float, variance: float, r: float, width: int, q: float) -> _Spread:
        """For Gaussian features of one mean."""
        square, covariance, scale = mean**2, r * variance, 1.0 / (width * q * q)
        return cls(
            own=(4.0 * square * variance + 2.0 * variance**2) * scale,
            between=(4.0 * square * covariance + 2.0 * covariance**2) * scale,
            with_product=(2.0 * square * (variance + covariance) + 2.0 * covariance * variance) * scale,
        )


def _kept(variance: float, eps: float) -> float:
    return variance / (variance + eps) if variance > 0.0 else 0.0


def _positive(value: float) -> float:
    if value <= 0.0:
        raise ValueError("expected a variance or an eps above 0: a norm of a constant 0 without eps has no gradient")
    return value


def _wide(width: int) -> int:
    if width < NARROWEST:
        raise ValueError(f"expected a width of at least {NARROWEST}, got {width}")
    return width
