"""Means over the rows, and over pairs of rows, of an attention matrix with normal scores. Imports no torch.

`RowTable` tabulates the integrals of `laplace.py` over the deviation of the scores, once per number of keys and
causality, and interpolates. Under a causal mask row i sees i keys: the table holds means over i = 1..n, and over pairs.

Two rows whose scores are correlated by rho share

    overlap(rho) = E sum_j a_j b_j = sum_k o_k rho^k,   all o_k >= 0     (Hermite expansion)

o_0..o_3 are known exactly from the expected derivatives of softmax, and so are overlap(1) and its slope there. The
tail from rho^4 on is taken as geometric with that value and slope. The slope of the overlap is s^2 E tr(J_a J_b): one
function serves the forward and the backward pass. Derivation and accuracy: docs/attention-moments.md.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.interpolate import CubicSpline

from clearhead.signal.moments.laplace import (
    LARGEST_SPREAD,
    LONGEST,
    Array,
    RowStatistics,
    largest_weight,
    nested_rows,
    row_statistics,
)

# Columns of a table of rows.
SQUARES, JACOBIAN, KEPT, PULL, LEAN, SPREAD, ENTROPY, LARGEST = range(8)
ROW_COLUMNS = 8
# Columns of a table of pairs: coefficients of the overlap in rho, its value and slope at 1, and E(1-P)(1-P').
FLAT, FIRST, SECOND, THIRD, END, END_SLOPE, BOTH_KEPT = range(7)

SPREADS = np.sinh(np.linspace(0.0, math.asinh(LARGEST_SPREAD), 40))
FINE = 2048
SETTLED = 10.0


@dataclass(frozen=True, eq=False)
class RowTable:
    """Statistics over the deviation s of the scores: `rows(s)` and `pairs(s)`, one row of columns per s."""

    keys: int
    causal: bool
    uniform_entropy: float
    inverse_keys: float
    """Mean over rows of 1 / n."""
    flat_jacobians: float
    """E tr(J J') of two rows of equal weights."""
    window: int | None
    nodes: Array
    """Numbers of keys at which rows are computed."""
    node_weights: Array
    """Their weights in a mean over rows."""
    _fine_rows: Array
    _fine_pairs: Array
    _fine_same: Array
    _fine_log_sums: Array

    def rows(self, spread: Array) -> Array:
        """Columns SQUARES .. LARGEST at each s.

        SQUARES E sum a^2; JACOBIAN E ||J||_F^2; KEPT E (1 - sum a^2)^2; PULL E (sum a u)^2;
        LEAN E sum a^2 (u - sum a u)^2; SPREAD E (sum a u^2 - (sum a u)^2); ENTROPY; LARGEST E max a.
        """
        inside = _look_up(self._fine_rows, spread)
        if np.max(spread) <= LARGEST_SPREAD:
            return inside
        # What is left beside the one winning key falls as 1 / s.
        return ROW_LIMITS + (inside - ROW_LIMITS) * _beyond(spread)[..., None] ** ROW_POWERS

    def pairs(self, spread: Array) -> Array:
        """Columns FLAT .. BOTH_KEPT at each s."""
        return self._pairs(self._fine_pairs, spread)

    def same(self, spread: Array) -> Array:
        """The same columns for a row and a copy of itself with other scores, mean over rows."""
        return self._pairs(self._fine_same, spread)

    def log_sums(self, spread: Array) -> Array:
        """E log sum_j e^{z_j} for each of `nodes`, at each s."""
        inside = _look_up(self._fine_log_sums, spread)
        if np.max(spread) <= LARGEST_SPREAD:
            return inside
        return inside / _beyond(spread)[..., None]  # the largest score, s times a number

    @staticmethod
    def _pairs(fine: Array, spread: Array) -> Array:
        inside = _look_up(fine, spread)
        return inside if np.max(spread) <= LARGEST_SPREAD else inside * _beyond(spread)[..., None] ** PAIR_POWERS


# Limits of the columns of rows at s -> inf, and the powers of 1/s at which the columns approach them (pairs: grow).
ROW_LIMITS = np.array([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0])
ROW_POWERS = np.array([1.0, 1.0, 1.0, 0.0, 3.0, 1.0, 1.0, 1.0])
PAIR_POWERS = np.array([0.0, 0.0, 0.0, 0.0, 0.0, -1.0, 2.0])


def _beyond(spread: Array) -> Array:
    return LARGEST_SPREAD / np.maximum(spread, LARGEST_SPREAD)


def _look_up(fine: Array, spread: Array) -> Array:
    place = np.arcsinh(np.minimum(spread, LARGEST_SPREAD)) * ((FINE - 1) / math.asinh(LARGEST_SPREAD))
    left = np.minimum(place.astype(np.int64), FINE - 2)
    part = (place - left)[..., None]
    return fine[left] * (1.0 - part) + fine[left + 1] * part


@lru_cache(maxsize=64)
def row_table(keys: int, causal: bool, window: int | None = None) -> RowTable:
    """The table of rows that see `keys` keys, or 1..keys of them under a causal mask.

    With a window rows at the edges of the sequence see fewer keys, and two rows share some keys or none: pairs are
    computed as of full windows, times what equal weights would share. Raises `ValueError` for no keys, or more than
    2^20.
    """
    if window is not None and window < keys:
        return _windowed(keys, causal, window)
    if not 1 <= keys <= LONGEST:
        raise ValueError(f"keys: expected 1 to {LONGEST}, got {keys}; predict a shorter sequence")
    nodes = key_nodes(keys) if causal else np.array([float(keys)])
    hats = _hats(nodes, keys) if causal else np.ones((1, 1))
    weight_n = hats.mean(axis=0)
    weight_nn = _pair_weights(hats) if causal else np.ones((1, 1))
    weights = np.stack([weight_nn, np.diag(weight_n)])
    rows, log_sums = np.empty((len(SPREADS), ROW_COLUMNS)), np.empty((len(SPREADS), len(nodes)))
    pairs = np.empty((len(SPREADS), 2, 7))
    for k, spread in enumerate(SPREADS):
        columns, statistics = _rows_at(float(spread), nodes)
        rows[k] = weight_n @ columns
        pairs[k] = _pair_columns(float(spread), nodes, weights, statistics)
        log_sums[k] = statistics.log_sum
        if spread > SETTLED:  # o_2 and o_3 have reached their limits; s^6 would only magnify rounding
            pairs[k][:, [SECOND, THIRD]] = pairs[k - 1][:, [SECOND, THIRD]]
    at, fine_at = np.arcsinh(SPREADS), np.linspace(0.0, math.asinh(LARGEST_SPREAD), FINE)
    return RowTable(
        keys,
        causal,
        uniform_entropy=float(weight_n @ np.log(nodes)),
        inverse_keys=float(weight_n @ (1.0 / nodes)),
        flat_jacobians=float((weight_nn * _flat(nodes)).sum()),
        window=None,
        _fine_rows=CubicSpline(at, rows)(fine_at),
        nodes=nodes,
        node_weights=weight_n,
        _fine_pairs=CubicSpline(at, pairs[:, 0])(fine_at),
        _fine_same=CubicSpline(at, pairs[:, 1])(fine_at),
        _fine_log_sums=CubicSpline(at, log_sums)(fine_at),
    )


def _windowed(keys: int, causal: bool, window: int) -> RowTable:
    side = window - 1 if causal else (window - 1) // 2
    place = np.arange(keys)
    after = 0 if causal else side
    lengths = np.minimum(place, side) + 1 + np.minimum(keys - 1 - place, after)
    full = row_table(min(side + 1 + after, keys), False)
    shared = full.keys * _flat_overlap(lengths, side, after)
    share, count = np.array([shared] * 6 + [1.0]), np.bincount(lengths, minlength=full.keys + 1) / keys
    nodes = key_nodes(full.keys)
    hats = _hats(nodes, full.keys)
    weight_n = count[1:] @ hats
    at = np.linspace(0.0, math.asinh(LARGEST_SPREAD), FINE)
    rows = [weight_n @ _rows_at(float(spread), nodes)[0] for spread in SPREADS]
    return dataclasses.replace(
        full,
        keys=keys,
        causal=causal,
        window=window,
        uniform_entropy=float(weight_n @ np.log(nodes)),
        inverse_keys=float(weight_n @ (1.0 / nodes)),
        flat_jacobians=full.flat_jacobians * shared,
        _fine_rows=CubicSpline(np.arcsinh(SPREADS), np.array(rows))(at),
        _fine_pairs=full._fine_pairs * share,
    )


def _flat_overlap(lengths: Array, side: int, after: int) -> float:
    """Mean over pairs of rows of the keys that both see over the product of what each sees."""
    keys, total = len(lengths), 0.0
    for gap in range(1, min(side + after + 1, keys)):
        whole = range(side, max(side, keys - after - gap))  # first rows of pairs of full windows
        total += len(whole) * max(side + after + 1 - gap, 0) / (side + after + 1.0) ** 2
        first = np.r_[0 : min(side, keys - gap), whole.stop : keys - gap]
        common = np.minimum(first + after, keys - 1) - np.maximum(first + gap - side, 0) + 1
        total += float((np.maximum(common, 0) / (lengths[first] * lengths[first + gap])).sum())
    return 2.0 * total / (keys * (keys - 1.0))


def _rows_at(spread: float, nodes: Array) -> tuple[Array, RowStatistics]:
    """Columns of rows for each number of keys, and the statistics they come from."""
    few = nodes if len(nodes) <= 3 else np.unique(np.append(nodes[::3], nodes[-1]))
    largest = np.exp(np.interp(np.log(nodes), np.log(few), np.log(largest_weight(spread, few))))
    statistics = row_statistics(spread, nodes)
    return _row_columns(spread, statistics, largest), statistics


def key_nodes(keys: int) -> Array:
    """Numbers of keys at which causal rows are computed: all up to 6, then about a quarter more each."""
    nodes = list(range(1, min(keys, 6) + 1))
    while nodes[-1] < keys:
        nodes.append(min(keys, math.ceil(nodes[-1] * 1.26)))
    return np.array(nodes, dtype=float)


def _hats(nodes: Array, keys: int) -> Array:
    """[i, node]: weights that interpolate row i = 1..keys between the nodes, linearly in log i."""
    place = np.interp(np.log(np.arange(1, keys + 1)), np.log(nodes), np.arange(len(nodes)))
    return np.maximum(0.0, 1.0 - np.abs(place[:, None] - np.arange(len(nodes))))


def _pair_weights(hats: Array) -> Array:
    """[node of the shorter row, node of the longer]: weights of the mean over pairs of different rows."""
    if len(hats) < 2:
        return np.zeros((1, 1))
    before = np.cumsum(hats, axis=0) - hats
    weights = before.T @ hats
    return weights / weights.sum()


def _flat(nodes: Array) -> Array:
    """tr(J J') of two rows of equal weights, over the n keys that both see: (1 - 1/n) / n'."""
    short, long = nodes[:, None], nodes[None, :]
    return np.asarray((1.0 - 1.0 / short) / long + 0.0 * long)


def _row_columns(spread: float, rows: RowStatistics, largest: Array) -> Array:
    p, p2 = rows.squares, rows.squares_squared
    jacobian = np.maximum(p - 2.0 * rows.cubes + p2, 0.0)
    entropy = np.maximum(rows.log_sum - spread**2 * (1.0 - p), 0.0)
    spread_of_u = np.maximum(rows.square - rows.pull, 0.0)
    return np.stack([p, jacobian, 1.0 - 2.0 * p + p2, rows.pull, rows.lean, spread_of_u, entropy, largest], axis=1)


def _pair_columns(spread: float, nodes: Array, weights: Array, rows: RowStatistics) -> Array:
    """Mean over pairs of the overlap's coefficients; the shorter row is the first index.

    With d_k a = the k-th derivatives of the weights by the scores, o_k = s^{2k} / k! sum (E d_k a)(E d_k b).
    Exchangeability and rows that sum to 1 leave one or two free numbers per order: the expected cumulants of a
    categorical variable.
    """
    short, long = nodes[:, None], nodes[None, :]
    kept = 1.0 - rows.squares
    skew = 1.0 - 3.0 * rows.squares + 2.0 * rows.cubes
    same = 1.0 - 7.0 * rows.squares + 12.0 * rows.cubes - 6.0 * rows.fourths  # n E(aaaa)
    twos = -(kept) + 4.0 * (rows.squares - rows.cubes) - 6.0 * (rows.squares_squared - rows.fourths)
    s2 = spread**2

    def less(m: float) -> tuple[Array, Array]:
        return np.maximum(short - m, 0.0), np.maximum(long - m, 1e-9)

    (s1, l1), (s_2, l2), (s3, _) = less(1.0), less(2.0), less(3.0)
    flat = 1.0 / long + 0.0 * short
    first = s2 * np.outer(kept, kept) / long * np.where(long > 1, 1.0 + 1.0 / l1, 0.0)
    more = np.where(short > 1, 3.0 / l1, 0.0) + np.where(short > 2, 4.0 / (l1 * l2), 0.0)
    second = 0.5 * s2**2 * np.outer(skew, skew) / long * (1.0 + more)

    # Third derivatives, per tuple of distinct keys: (aaaa), (aaab), (aabb), (aabc), (abcd).
    def tuples(n: Array) -> tuple[Array, ...]:
        m1, m2, m3 = np.maximum(n - 1, 1e-9), np.maximum(n - 2, 1e-9), np.maximum(n - 3, 1e-9)
        aaaa = same / n
        aaab = np.where(n > 1, -aaaa / m1, 0.0)
        aabb = np.where(n > 1, twos / (n * m1), 0.0)
        aabc = np.where(n > 2, -(aaab + aabb) / m2, 0.0)
        abcd = np.where(n > 3, -3.0 * aabc / m3, 0.0)
        return aaaa, aaab, aabb, aabc, abcd

    n = short
    counts = (n, 4 * n * s1, 3 * n * s1, 6 * n * s1 * s_2, n * s1 * s_2 * s3)
    third = s2**3 / 6.0 * sum(c * np.outer(t, t) for c, t in zip(counts, tuples(nodes), strict=True))

    end, slope = np.zeros_like(flat), np.zeros_like(flat)
    for k, shorter in enumerate(nodes):
        if weights[:, k].any():
            nested = nested_rows(spread, float(shorter), nodes[k:])
            end[k, k:], slope[k, k:] = nested.product, s2 * nested.jacobians
    both = np.outer(kept, kept)
    columns = np.stack([flat, first, second, third, end, slope, both])
    return np.tensordot(weights, columns, axes=([1, 2], [1, 2]))


@dataclass(frozen=True, eq=False)
class Overlap:
    """The overlap of two rows as a function of the correlation of their scores: o_0..o_3 and a geometric tail."""

    orders: tuple[Array, Array, Array, Array]
    tail: Array
    """The sum of o_4, o_5, ..."""
    ratio: Array
    """o_{k+1} / o_k in the tail."""

    @classmethod
    def of(cls, columns: Array) -> Overlap:
        """From columns [.., 7] of `RowTable.pairs` or `RowTable.same`."""
        flat, first, second, third = (columns[..., k] for k in (FLAT, FIRST, SECOND, THIRD))
        tail = np.maximum(columns[..., END] - flat - first - second - third, 0.0)
        slope = np.maximum(columns[..., END_SLOPE] - first - 2.0 * second - 3.0 * third, 4.0 * tail)
        # The tail's slope at 1 is tail * (4 + ratio / (1 - ratio)).
        ratio = np.where(tail > 0.0, 1.0 - tail / np.maximum(slope - 3.0 * tail, 1e-300), 0.0)
        return cls((flat, first, second, third), tail, np.clip(ratio, 0.0, 0.999))

    def blend(self, other: Overlap) -> Overlap:
        """The overlap of a row of `self`'s deviation with a row of `other`'s.

        o_k is then the product of what each row brings, the geometric mean of the two o_k: exact for k < 3, where the
        expected derivatives have one free number; Cauchy and Schwarz's upper bound from there on.
        """
        orders = tuple(np.sqrt(np.maximum(a * b, 0.0)) for a, b in zip(self.orders, other.orders, strict=True))
        ratio = np.sqrt(self.ratio * other.ratio)
        first = self.tail * other.tail * (1.0 - self.ratio) * (1.0 - other.ratio)
        return Overlap((orders[0], orders[1], orders[2], orders[3]), np.sqrt(first) / (1.0 - ratio), ratio)

    def value(self, rho: Array) -> Array:
        """E sum_j a_j b_j at correlation `rho`."""
        flat, first, second, third = self.orders
        tail = self.tail * rho**4 * (1.0 - self.ratio) / (1.0 - self.ratio * rho)
        return flat + rho * (first + rho * (second + rho * third)) + tail

    def slope(self, rho: Array) -> Array:
        """The derivative by rho, s^2 E tr(J_a J_b)."""
        _, first, second, third = self.orders
        below = 1.0 - self.ratio * rho
        tail = self.tail * rho**3 * (1.0 - self.ratio) * (4.0 * below + self.ratio * rho) / below**2
        return first + rho * (2.0 * second + 3.0 * rho * third) + tail

    def mean(self, rho: Array) -> Array:
        """The mean of the overlap over correlations from 0 to `rho`."""
        return sum((w * self.value(t * rho) for t, w in zip(*_LEGENDRE, strict=True)), np.zeros(1))


_POINTS, _WEIGHTS = np.polynomial.legendre.leggauss(8)
_LEGENDRE = (0.5 + 0.5 * _POINTS, 0.5 * _WEIGHTS)
