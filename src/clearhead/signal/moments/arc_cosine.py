"""The arc-cosine kernel of degree 1, which ReLU makes of a correlation. Needs no scipy: a config can ask for it."""

from __future__ import annotations

import math

from clearhead.signal.moments.domain import bounded


def relu_raw_correlation(r: float) -> float:
    """Return K(r) = r + (sqrt(1 - r^2) - r acos r) / pi: the *raw* token correlation after ReLU of a mean-0 input.

    This is what a linear map behind the ReLU sees. K(0) = 1/pi, K(1) = 1, K(-1) = 0.
    """
    r = bounded(r)
    return r + (math.sqrt((1.0 - r) * (1.0 + r)) - r * math.acos(r)) / math.pi
