"""ReLU, in closed form for any mean."""

from __future__ import annotations

import math

from scipy import special

from clearhead.signal.moments.domain import bounded, checked
from clearhead.signal.moments.response import Response
from clearhead.signal.moments.types import Moments


def relu_response(x: Moments) -> Response:
    """Return the moments of max(x, 0) and of its slope.

    Mean 0 (as in DeepScaleLM's code), s^2 the variance, r the correlation of x:

        mean = s / sqrt(2 pi)                variance = s^2 (pi - 1) / (2 pi)
        covariance = s^2 [ (1/4 + asin(r) / (2 pi)) r - (1 - sqrt(1 - r^2)) / (2 pi) ]
        E f'^2 = 1/2                         E f'(x) f'(y) = 1/4 + asin(r) / (2 pi)

    Any mean (derived by us, from the moments of a truncated normal pair), with h = mean / s, q = sqrt((1-r)/(1+r)),
    P = Phi(h) - 2 T(h, q) the probability that both are positive (T is Owen's function):

        E f = s (phi(h) + h Phi(h))          E f^2 = s^2 ((h^2 + 1) Phi(h) + h phi(h))
        E f(x) f(y) = s^2 [ (h^2 + r) P + 2 h phi(h) Phi(h q) + sqrt(1 - r^2) exp(-h^2 / (1 + r)) / (2 pi) ]
        E f'^2 = Phi(h)                      E f'(x) f'(y) = P
    """
    mean, variance, r = checked(x)
    if variance == 0.0:
        slope = 1.0 if mean > 0.0 else 0.0
        return Response(max(mean, 0.0), 0.0, 0.0, slope, slope)
    deviation = math.sqrt(variance)
    h = mean / deviation
    below = _centred(-abs(h), r)
    if h <= 0.0:
        standard = below
    else:
        # max(x, 0) = x + max(-x, 0): for a positive mean this loses no digits to h^2.
        out = float(special.ndtr(-h))
        standard = Response(
            mean=h + below.mean,
            variance=1.0 - 2.0 * out + below.variance,
            covariance=r * (1.0 - 2.0 * out) + below.covariance,
            slope_square=1.0 - out,
            slope_product=1.0 - 2.0 * out + below.slope_product,
        )
    return Response(
        deviation * standard.mean,
        variance * standard.variance,
        variance * standard.covariance,
        standard.slope_square,
        standard.slope_product,
    )


def _centred(h: float, r: float) -> Response:
    """max(h + z, 0) for a standard normal pair z with correlation r, h <= 0."""
    if h == 0.0:
        return Response(
            mean=1.0 / math.sqrt(2.0 * math.pi),
            variance=(math.pi - 1.0) / (2.0 * math.pi),
            covariance=_covariance_at_zero(r),
            slope_square=0.5,
            slope_product=0.25 + math.asin(r) / (2.0 * math.pi),
        )
    density = math.exp(-0.5 * h * h) / math.sqrt(2.0 * math.pi)
    above = float(special.ndtr(h))
    mean = density + h * above
    variance = max(0.0, (h * h + 1.0) * above + h * density - mean**2)
    if r == -1.0:
        return Response(mean, variance, -(mean**2), above, 0.0)
    q = math.sqrt((1.0 - r) / (1.0 + r))
    both = max(0.0, above - 2.0 * float(special.owens_t(h, q)))
    joint = math.sqrt(1.0 - r * r) * math.exp(-h * h / (1.0 + r)) / (2.0 * math.pi)
    product = (h * h + r) * both + 2.0 * h * density * float(special.ndtr(h * q)) + joint
    covariance = product - mean**2
    return Response(mean, variance, min(variance, max(-variance, covariance)), above, both)


def _covariance_at_zero(r: float) -> float:
    # 1 - sqrt(1 - r^2) written without the difference.
    bend = r * r / (1.0 + math.sqrt((1.0 - r) * (1.0 + r)))
    return (0.25 + math.asin(r) / (2.0 * math.pi)) * r - bend / (2.0 * math.pi)


def relu_centred_correlation(r: float) -> float:
    """Return the token correlation after ReLU of a mean-0 input, *about the mean*; 0 at r = 0 and 1 at r = 1."""
    return _covariance_at_zero(bounded(r)) * 2.0 * math.pi / (math.pi - 1.0)
