"""GELU, x Phi(x), in closed form for a mean of 0."""

from __future__ import annotations

import math

from clearhead.signal.moments.response import Response


def centred_gelu_response(variance: float, r: float) -> Response:
    """Return the moments of x Phi(x) and of its slope for a mean-0 input of variance s^2 and correlation r.

    The closed forms of DeepScaleLM's code, written with a = s^2 / (1 + s^2) and D = sqrt(1 - r^2 a^2), so that nothing
    cancels at r = 0 or at a small s:

        mean = s sqrt(a) / sqrt(2 pi)
        covariance = (s^2 / 4) [ r + (2 r / pi) asin(r a) + (2 a r^2 / pi) (a^2 / (1 + D) + 1 - 2 a) / D ]
        E f'(x) f'(y) = 1/4 + (1 / (2 pi)) [ asin(r a) + r a (1 - a) (3 - a - 2 r^2 a^2) / D^3 ]

    The variance and E f'^2 are the same at r = 1.
    """
    a = variance / (1.0 + variance)
    rest = 1.0 / (1.0 + variance)
    return Response(
        mean=math.sqrt(variance * a / (2.0 * math.pi)),
        variance=_covariance(variance, a, rest, 1.0),
        covariance=_covariance(variance, a, rest, r),
        slope_square=_slope_product(a, rest, 1.0),
        slope_product=_slope_product(a, rest, r),
    )


def _root(a: float, rest: float, r: float) -> float:
    # 1 - |r| a = (1 - a) + a (1 - |r|), which stays exact as a -> 1.
    return math.sqrt((rest + a * (1.0 - abs(r))) * (1.0 + abs(r) * a))


def _covariance(variance: float, a: float, rest: float, r: float) -> float:
    root = _root(a, rest, r)
    arc = (2.0 * r / math.pi) * math.asin(r * a)
    bend = (2.0 * a * r * r / math.pi) * (a * a / (1.0 + root) + 1.0 - 2.0 * a) / root
    return 0.25 * variance * (r + arc + bend)


def _slope_product(a: float, rest: float, r: float) -> float:
    bend = r * a * rest * (3.0 - a - 2.0 * (r * a) ** 2) / _root(a, rest, r) ** 3
    return 0.25 + (math.asin(r * a) + bend) / (2.0 * math.pi)
