"""Which law a growth follows: with the logarithm of the depth, or with the depth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Laws:
    """Least squares of y = a + b ln n and of y = a + b n, and the exponent of y = a n^b in logarithms."""

    log_slope: float
    log_r2: float
    linear_slope: float
    linear_r2: float
    exponent: float

    @property
    def better(self) -> str:
        """The law that leaves the smaller squared residuals; both have two constants."""
        return "log n" if self.log_r2 > self.linear_r2 else "n"


def fit(depths: Sequence[float], values: Sequence[float]) -> Laws:
    """Fit both. `depths` and `values` are positive; at least three of each."""
    if len(depths) != len(values) or len(depths) < 3:
        raise ValueError(f"expected at least three depths and as many values, got {len(depths)} and {len(values)}")
    logs = [math.log(depth) for depth in depths]
    log_slope, log_r2 = _line(logs, values)
    linear_slope, linear_r2 = _line(depths, values)
    exponent, _ = _line(logs, [math.log(value) for value in values])
    return Laws(log_slope, log_r2, linear_slope, linear_r2, exponent)


def _line(across: Sequence[float], up: Sequence[float]) -> tuple[float, float]:
    """Slope and R^2 = 1 - residual / total of a straight line."""
    x, y = np.asarray(across, float), np.asarray(up, float)
    slope, start = np.polyfit(x, y, 1)
    residual = float(((y - start - slope * x) ** 2).sum())
    total = float(((y - y.mean()) ** 2).sum())
    return float(slope), 1.0 - residual / total if total > 0.0 else 0.0
