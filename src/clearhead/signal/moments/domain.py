"""What a formula's inputs may be, checked in one place."""

from __future__ import annotations

import math

from clearhead.signal.moments.types import Moments

ROUNDING = 1e-6
"""A correlation may leave [-1, 1] by this much and is put back; more than that is somebody's mistake."""


def checked(x: Moments) -> tuple[float, float, float]:
    """Return (mean, variance, correlation), the last within [-1, 1]; `ValueError` for what no variable can have."""
    if not (math.isfinite(x.mean) and math.isfinite(x.covariance) and 0.0 <= x.variance < math.inf):
        raise ValueError(f"expected finite moments with a variance of at least 0, got {x}; was there a NaN before?")
    return x.mean, x.variance, bounded(x.correlation)


def bounded(correlation: float) -> float:
    """Return the correlation, put back into [-1, 1] when rounding carried it out; `ValueError` when more did."""
    if not abs(correlation) <= 1.0 + ROUNDING:
        raise ValueError(f"expected a correlation within [-1, 1], got {correlation}; |covariance| exceeds the variance")
    return min(1.0, max(-1.0, correlation))


def probability(p: float) -> float:
    """Return p when it is a dropout probability in [0, 1)."""
    if not 0.0 <= p < 1.0:
        raise ValueError(f"expected a dropout probability in [0, 1), got {p}; at 1 nothing is left to scale")
    return p
