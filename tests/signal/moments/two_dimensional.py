"""E f(x) f(y) for a Gaussian pair by brute force in two dimensions: knows nothing of any closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

REACH = 12.0
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
EDGES = (-12.0, -8.0, -5.0, -3.0, -1.5, 0.0, 1.5, 3.0, 5.0, 8.0, 12.0)


def _panels(cut: float) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre nodes and normal weights on panels that also end at `cut`, where f has its kink."""
    edges = np.array(sorted({*EDGES, *([cut] if -REACH < cut < REACH else [])}))
    middle, half = (edges[1:] + edges[:-1]) / 2, (edges[1:] - edges[:-1]) / 2
    z = (middle[:, None] + half[:, None] * NODES).ravel()
    return z, (half[:, None] * WEIGHTS).ravel() * np.exp(-z * z / 2) / math.sqrt(2 * math.pi)


def one(f: Callable, mean: float, deviation: float) -> float:
    """E f(x)."""
    z, w = _panels(-mean / deviation)
    return float(w @ f(mean + deviation * z))


def pair(f: Callable, mean: float, deviation: float, r: float) -> float:
    """E f(x) f(y) at correlation |r| < 1, raw."""
    rest = math.sqrt(1 - r * r)
    outer, weights = _panels(-mean / deviation)
    total = 0.0
    for z, w in zip(outer, weights):
        inner, inner_weights = _panels((-mean / deviation - r * z) / rest)
        total += (
            w
            * float(f(np.array(mean + deviation * z)))
            * float(inner_weights @ f(mean + deviation * (r * z + rest * inner)))
        )
    return total
