"""Softmax of independent normal scores, by one-dimensional integrals. Imports no torch.

A row has n scores s * u_j with u_j independent standard normal; a = softmax of it, Z = sum_j e^{s u_j}. Because
1 / Z^k = (1 / (k-1)!) int_0^inf t^{k-1} e^{-tZ} dt, the expectation of any product of weights and scores becomes one
integral over t of products of

    phi_{p,m}(t) = E[u^m (t e^{su})^p exp(-t e^{su})]          (t^p is put inside: nothing overflows)

for instance E sum_j a_j^2 = n int phi_{2,0} phi^{n-1} dt/t with phi = phi_{0,0}. Nothing is expanded in s: the
integrals hold where one key has all the weight as well as where all weights are equal. Both integrals are trapezoid
sums of smooth functions that vanish at both ends, which converges faster than any power of the step. Derivation:
docs/attention-moments.md.

Shapes: t points of log t, z points of the normal, n numbers of keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.signal import lfilter

Array = NDArray[np.float64]

REACH = 9.0
"""The normal is cut at so many standard deviations."""
LONGEST = 1 << 20
"""Most keys for which the grid of t is wide enough."""
LARGEST_SPREAD = 20.0
"""Largest standard deviation of the scores in the tables."""


@dataclass(frozen=True, eq=False)
class Transforms:
    """phi_{p,m} on a grid of log t, for one standard deviation of the scores."""

    spread: float
    step: float
    log_t: Array
    log_phi_t: Array
    phi_pmt: tuple[tuple[Array, ...], ...]


@lru_cache(maxsize=256)
def transforms(spread: float) -> Transforms:
    """Tabulate phi_{p,m}, p = 0..4, m = 0..2, for scores of standard deviation `spread`."""
    z, weight_z = _normal(spread)
    log_t = _log_t(spread)
    e_tz = np.exp(np.minimum(log_t[:, None] + spread * z, 7.0))
    term_tz = np.exp(-e_tz)
    weight_zm = np.stack([weight_z, weight_z * z, weight_z * z * z], axis=1)
    phi = []
    for _ in range(5):
        phi.append(tuple((term_tz @ weight_zm).T))
        term_tz = term_tz * e_tz
    log_phi_t = np.log(np.maximum(phi[0][0], 1e-300))
    return Transforms(spread, float(log_t[1] - log_t[0]), log_t, log_phi_t, tuple(phi))


def _normal(spread: float) -> tuple[Array, Array]:
    step = min(0.1, 0.6 / max(spread, 1e-9))  # e^{-t e^{su}} turns from 1 to 0 over a width of about 1 / s
    z = np.arange(-REACH, REACH + step / 2, step)
    return z, np.exp(-0.5 * z * z) * (step / math.sqrt(2.0 * math.pi))


def _log_t(spread: float) -> Array:
    low, high = -(math.log(LONGEST) + REACH * spread + 12.0), REACH * spread + 4.0
    return np.linspace(low, high, max(160, int((high - low) / (0.35 * max(1.0, spread / 6.0)))))


@dataclass(frozen=True, eq=False)
class RowStatistics:
    """Expectations over a row, each an array over numbers of keys n; u is the score in units of its deviation s."""

    squares: Array
    """E sum a^2."""
    cubes: Array
    """E sum a^3."""
    fourths: Array
    """E sum a^4."""
    squares_squared: Array
    """E (sum a^2)^2."""
    pull: Array
    """E (sum a u)^2."""
    square: Array
    """E sum a u^2."""
    lean: Array
    """E sum a^2 (u - sum a u)^2."""
    log_sum: Array
    """E log Z."""


def row_statistics(spread: float, keys_n: Array) -> RowStatistics:
    """The statistics of rows of `keys_n` independent normal scores of deviation `spread`."""
    table = transforms(spread)
    phi, n = table.phi_pmt, np.asarray(keys_n, dtype=float)[:, None]
    power = [np.exp(np.maximum(n - m, 0.0) * table.log_phi_t) for m in range(4)]

    def weights(order: int, *terms: tuple[Array, int, Array]) -> Array:
        """int t^order / (order-1)! sum of (count x product of phi x phi^{n - distinct keys}) dt/t."""
        total = sum(((count * product) * power[distinct] for count, distinct, product in terms), np.zeros(1))
        return total.sum(axis=1) * (table.step / math.factorial(order - 1))

    pairs, triples = n * (n - 1.0), n * (n - 1.0) * (n - 2.0)
    square_u2 = weights(2, (n, 1, phi[2][2]))
    cross = weights(3, (n, 1, phi[3][2]), (pairs, 2, phi[1][1] * phi[2][1]))
    both = weights(
        4,
        (n, 1, phi[4][2]),
        (pairs, 2, 2.0 * phi[1][1] * phi[3][1] + phi[2][2] * phi[2][0]),
        (triples, 3, phi[1][1] ** 2 * phi[2][0]),
    )
    gap_t = np.exp(-np.exp(np.minimum(table.log_t, 7.0)))
    return RowStatistics(
        squares=weights(2, (n, 1, phi[2][0])),
        cubes=weights(3, (n, 1, phi[3][0])),
        fourths=weights(4, (n, 1, phi[4][0])),
        squares_squared=weights(4, (n, 1, phi[4][0]), (pairs, 2, phi[2][0] ** 2)),
        pull=weights(2, (n, 1, phi[2][2]), (pairs, 2, phi[1][1] ** 2)),
        square=weights(1, (n, 1, phi[1][2])),
        lean=np.maximum(square_u2 - 2.0 * cross + both, 0.0),
        log_sum=(gap_t - power[0]).sum(axis=1) * table.step,
    )


def largest_weight(spread: float, keys_n: Array) -> Array:
    """E max_j a_j for each number of keys.

    The largest score is u with probability density n f(u), the others lie below it:
    E max = n int f(u) du int dt/t (t e^{su}) e^{-t e^{su}} (int_{-inf}^u e^{-t e^{sv}} f(v) dv)^{n-1}.
    """
    z, weight_z = _normal(spread)
    log_t = _log_t(spread)[::2]
    e_tz = np.exp(np.minimum(log_t[:, None] + spread * z, 7.0))
    kernel_tz = np.exp(-e_tz) * weight_z
    below_tz = np.cumsum(kernel_tz, axis=1) - 0.5 * kernel_tz
    outer_tz = kernel_tz * e_tz
    keep = outer_tz > 1e-14 * outer_tz.max()
    log_below, outer = np.log(np.maximum(below_tz[keep], 1e-300)), outer_tz[keep]
    step = float(log_t[1] - log_t[0])
    return np.array([n * step * float(outer @ np.exp((n - 1.0) * log_below)) for n in np.asarray(keys_n, dtype=float)])


@dataclass(frozen=True, eq=False)
class NestedRows:
    """Two rows with the same scores, a over the first n keys, b over all n' >= n of them."""

    product: Array
    """E sum a b over the n shared keys."""
    jacobians: Array
    """E tr(J_a J_b) over the shared keys, J = diag(a) - a a^T."""


def nested_rows(spread: float, short: float, long_n: Array) -> NestedRows:
    """Expectations for a row of `short` keys and rows of `long_n` keys that hold them, as under a causal mask.

    With w = Z_n / Z_n' (so b = w a on the shared keys), 1 / (Z_n^k Z_n'^l) becomes a nested integral: over the t of
    the longer row alone, inside one over the sum u of both. The inner one is a cumulative sum.
    """
    table = transforms(spread)
    phi, n = table.phi_pmt, float(short)
    extra = np.exp((np.asarray(long_n, dtype=float)[:, None] - n) * table.log_phi_t)
    inner = [_cumulative(extra, order, table.step) for order in (1, 2, 3)]  # int_0^u t^k phi^{n'-n} dt / u^{k+1}

    def total(count: float, product_t: Array, distinct: int, kernel: Array) -> Array:
        return (count * product_t * np.exp(max(n - distinct, 0.0) * table.log_phi_t) * kernel).sum(axis=1) * table.step

    product = total(n, phi[2][0], 1, inner[0])
    w_cubes = total(n, phi[3][0], 1, inner[0] - inner[1])
    ww_cubes = total(n, phi[3][0], 1, inner[1])
    fourfold = inner[1] - inner[2]
    ww_squares = total(n, phi[4][0], 1, fourfold) + total(n * (n - 1.0), phi[2][0] ** 2, 2, fourfold)
    return NestedRows(product, product - w_cubes - ww_cubes + ww_squares)


def _cumulative(values: Array, order: int, step: float) -> Array:
    """int_{-inf}^x e^{-order (x - y)} f(y) dy on the grid.

    f is constant before the grid, and linear between its points up to a curvature term: the error is of fourth order.
    """
    values = values.copy()
    values[:, 1:-1] -= np.diff(values, 2, axis=1) / 12.0
    decay = math.exp(-order * step)
    whole = (1.0 - decay) / order
    new = (1.0 - whole / step) / order
    start = np.full((values.shape[0], 1), 1.0 / order) * values[:, :1]
    driven, _ = lfilter([new, whole - new], [1.0, -decay], values, axis=1, zi=start - new * values[:, :1])
    return driven
