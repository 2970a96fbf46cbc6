"""Scores of one attention: how much they vary within a row, and how two rows resemble each other. Imports no torch.

With q = W_q x and k = W_k y, the score is z_ij = scale q_i . k_j = scale p_i . y_j, p = W_k^T q. Given q_i, the own
parts of the keys (what tokens do not share) make z_ij independent normal over j with variance

    s_i^2 = scale^2 |q_i|^2 var_k d_in own_y,            own = variance - covariance

What all keys share adds the same to a whole row, and softmax does not see it. With rotary positions it does: the shared
part turns with the position and adds a variance of its own (`rotary_variance`). Two rows have the correlation of their
queries, the raw one, and with rotary positions times kappa(i - i') = (2/d) sum_m cos(theta_m (i - i')).

|p_i|^2 and the angle between p_i and p_i' are random, because heads and widths are finite: freedom is about
1 / (1/head_dim + 2/d). That matters, for e^{s^2} is convex: means over it are taken with a few Gauss points.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from clearhead.signal.moments.laplace import Array
from clearhead.signal.moments.types import Moments
from clearhead.signal.skeleton import AttentionShape


@dataclass(frozen=True)
class TemperatureMoments:
    """Mean and variance over tokens of the inverse temperatures (selective or learned).

    They multiply queries and values; the default leaves all as it is. The gradient through the temperature itself (its
    little network) is left out.
    """

    query_mean: float = 1.0
    query_variance: float = 0.0
    value_mean: float = 1.0
    value_variance: float = 0.0


NEUTRAL = TemperatureMoments()


@dataclass(frozen=True)
class Scores:
    """What the rows of scores look like."""

    variance: float
    """Within a row, mean over rows: s^2. With rotary positions, that of the independent scores that stand for them."""
    true_variance: float
    """Within a row, as it would be measured over infinitely many keys."""
    own_share: float
    """Of `variance`, the share of the keys' own parts: 1 without rotary positions."""
    shared_variance: float
    """Of what all keys of a row have in common; softmax does not see it, Self-Adjust does."""
    freedom: float
    """The directions that make the scores of two rows are alike up to 1 / sqrt of this."""
    norm_freedom: float
    """s_i^2 / s^2 fluctuates like a chi-square of so many degrees of freedom over that number."""
    steadiness: float
    """(E tau)^2 / E tau^2 of the query's temperature: two rows have different temperatures."""
    turns: tuple[float, ...]
    """kappa(i - i') of pairs of rows, a few equally likely values; (1,) without rotary positions."""
    query_correlation: float
    """Cosine of two queries before rotation."""
    query_square: float
    """E |q|^2 / head_dim, after QK-norm and temperature."""
    query_weight: float
    """Variance of the entries of W_q; with QK-norm, of the matrix that has the same Jacobian."""
    key_weight: float
    key_own: float
    """Variance of the features of y that makes the scores of a row differ (with rotary positions also the shared
    part)."""
    key_turn: float
    """kappa, mean over visible pairs of keys."""
    scale: float


def scores(
    x: Moments, y: Moments, shape: AttentionShape, keys: int, queries: int, temperature: TemperatureMoments = NEUTRAL
) -> Scores:
    """The scores of queries made of `x` against keys made of `y`."""
    own = max(y.variance - y.covariance, 0.0)
    turns, key_turn = rotary_turns(shape.head_dim, shape.rope_base, keys, queries, shape.causal)
    query_square = shape.query.fan_in * shape.query.variance * x.second_moment + shape.query.bias_variance
    key_square = shape.key.fan_in * shape.key.variance * y.second_moment + shape.key.bias_variance
    query_weight, key_weight = shape.query.variance, shape.key.variance
    cosine = 0.0
    if query_square > 0.0:
        raw = shape.query.fan_in * shape.query.variance * x.raw_covariance + shape.query.bias_variance
        cosine = min(max(raw / query_square, -1.0), 1.0)
    spread_of_norm = 1.0 / shape.head_dim + 1.0 / shape.query.fan_in
    if shape.qk_norm:
        query_weight = query_weight / query_square if query_square > 0.0 else 0.0
        key_weight = key_weight / key_square if key_square > 0.0 else 0.0
        # E 1/|k|^2 exceeds 1 / E|k|^2 by dk / (dk - 2) where tokens share their |k|, by nothing where they do not.
        key_weight *= 1.0 + 2.0 / max(shape.head_dim - 2.0, 2.0) * max(y.raw_correlation, 0.0)
        query_square, spread_of_norm = 1.0, 0.0
    tau2 = temperature.query_mean**2 + temperature.query_variance
    tau4 = (
        temperature.query_mean**4
        + 6.0 * temperature.query_mean**2 * temperature.query_variance
        + 3.0 * temperature.query_variance**2
    )
    # Relative variance of s_i^2: of |q|^2, of |W_k^T q|^2 given it, and of the temperature.
    relative = (1.0 + 2.0 * spread_of_norm) * (1.0 + 2.0 / shape.key.fan_in)
    tempered = relative * (tau4 / tau2**2 if tau2 > 0.0 else 1.0)
    scale = shape.scale if shape.scale is not None else 1.0 / math.sqrt(shape.head_dim)
    per_key = scale**2 * shape.head_dim * query_square * tau2 * key_weight * shape.key.fan_in
    turned = rotary_variance(shape.head_dim, shape.rope_base, keys, shape.causal, per_key * y.raw_covariance)
    key_own = own + max(y.raw_covariance, 0.0) * (1.0 - key_turn)
    from_own = per_key * own
    if shape.qk_norm:
        alike = min(max(y.raw_correlation, 0.0), 1.0)
        from_own *= alike + (1.0 - alike) * bounded_share(from_own, shape.head_dim)
    variance = from_own + turned
    return Scores(
        variance=variance,
        true_variance=per_key * key_own,
        own_share=from_own / variance if variance > 0.0 else 1.0,
        shared_variance=per_key * max(y.raw_covariance, 0.0) * key_turn,
        freedom=2.0 / (relative - 1.0),
        norm_freedom=2.0 / (tempered - 1.0),
        steadiness=temperature.query_mean**2 / tau2 if tau2 > 0.0 else 1.0,
        turns=turns,
        query_correlation=cosine,
        query_square=query_square * tau2,
        query_weight=query_weight * tau2,
        key_weight=key_weight,
        key_own=key_own,
        key_turn=key_turn,
        scale=scale,
    )


def bounded_share(variance: float, head_dim: int) -> float:
    """What part of `variance` counts for scores that are a cosine in `head_dim` dimensions, not normal.

    With QK-norm a score cannot exceed scale |q||k|. The variance that counts is that of normal scores with the same
    E e^{2z} / (E e^z)^2; for a cosine E e^{z} = 0F1(head_dim / 2; variance head_dim / 4).
    """
    if variance < 1e-6:
        return 1.0
    order = head_dim / 2.0 - 1.0
    reach = math.sqrt(variance * head_dim)
    one, two = (float(special.ive(order, k * reach)) for k in (1.0, 2.0))
    if one <= 0.0 or two <= 0.0:  # so many dimensions that it underflows: the first correction to the normal
        return max(1.0 - 3.5 * variance / (head_dim + 2.0), 0.0)

    def log_mean(bessel: float, z: float) -> float:  # log 0F1, by the scaled Bessel function
        return math.log(bessel) + z - order * math.log(z / 2.0) + math.lgamma(order + 1.0)

    return min((log_mean(two, 2.0 * reach) - 2.0 * log_mean(one, reach)) / variance, 1.0)


TURN_BINS = 8


@lru_cache(maxsize=64)
def rotary_turns(
    head_dim: int, base: float | None, keys: int, queries: int, causal: bool
) -> tuple[tuple[float, ...], float]:
    """kappa of pairs of rows (a few values of equal weight), and its mean over visible pairs of keys."""
    if base is None:
        return (1.0,), 1.0
    theta = base ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    longest = max(keys, queries)
    kappa = np.cos(np.outer(np.arange(longest), theta)).mean(axis=1)
    gaps = np.arange(1, queries)
    values, weight = kappa[1:queries], (queries - gaps).astype(float)
    turns = _bins(values, weight) if queries > 1 else (1.0,)
    return turns, _mean_over_keys(kappa[:keys], causal)


@lru_cache(maxsize=64)
def _rotary_table(head_dim: int, base: float, keys: int, causal: bool) -> tuple[Array, Array]:
    """(deviations, effective variances) of what keys share, turned by rotary positions.

    Over a row it is a sum of a few waves, a_m cos(theta_m j) + b_m sin(theta_m j) with normal a, b, which moves
    slowly: its exponential is far less heavy-tailed than that of independent normal scores of the same variance. The
    effective variance is that of independent scores with the same E log [mean(e^2y) / mean(e^y)^2], over 48 drawn
    rows (fixed seed).
    """
    rng = np.random.default_rng(7)
    theta = base ** (-2.0 * np.arange(head_dim // 2) / head_dim)
    angle = np.outer(theta, np.arange(min(keys, 4096)))
    a, b = rng.standard_normal((2, 48, head_dim // 2)) / math.sqrt(head_dim // 2)
    wave = a @ np.cos(angle) + b @ np.sin(angle)
    last = np.unique(np.geomspace(2, wave.shape[1], 12).astype(int)) - 1 if causal else np.array([wave.shape[1] - 1])
    weight = np.gradient(last.astype(float)) if len(last) > 1 else np.ones(1)
    deviations = np.concatenate([np.linspace(0.0, 4.0, 17), np.geomspace(5.0, 64.0, 12)])
    found = []
    for deviation in deviations:
        y = deviation * wave
        e = np.exp(y - np.maximum.accumulate(y, axis=1)[:, -1:])
        count = last + 1.0
        one, two = np.cumsum(e, axis=1)[:, last], np.cumsum(e * e, axis=1)[:, last]
        ratio = np.maximum(two, 1e-300) * count / np.maximum(one, 1e-150) ** 2
        found.append(float(np.log(np.clip(ratio, 1.0, count)).mean(axis=0) @ weight / weight.sum()))
    return deviations, np.array(found)


def rotary_variance(head_dim: int, base: float | None, keys: int, causal: bool, shared: float) -> float:
    """The variance of independent scores that stands for a shared part of variance `shared`; 0 without rotation."""
    if base is None or shared <= 0.0 or keys < 2:
        return 0.0
    deviations, effective = _rotary_table(head_dim, base, keys, causal)
    return float(np.interp(shared, deviations**2, effective))


def _bins(values: Array, weight: Array) -> tuple[float, ...]:
    """Means of bins of equal weight of the sorted values."""
    order = np.argsort(values)
    edges = np.linspace(0.0, weight.sum(), TURN_BINS + 1)
    integral = np.interp(
        edges, np.append(0.0, np.cumsum(weight[order])), np.append(0.0, np.cumsum((weight * values)[order]))
    )
    return tuple(float(v) for v in np.diff(integral) / np.diff(edges))


def _mean_over_keys(kappa: Array, causal: bool) -> float:
    """Mean over pairs of different visible keys; under a causal mask also over rows of at least two keys."""
    n = len(kappa)
    if n < 2:
        return 1.0
    # sum over pairs j < j' <= m of kappa(j' - j), for every m
    by_length = np.cumsum(np.cumsum(kappa[1:]))
    m = np.arange(2, n + 1)
    means = by_length / (m * (m - 1) / 2.0)
    return float(means.mean() if causal else means[-1])


@lru_cache(maxsize=256)
def norm_points(freedom: float, count: int = 7) -> tuple[Array, Array]:
    """Points and weights of chi-square / freedom, by Wilson and Hilferty's cube of a normal; the mean is exactly 1."""
    points, weights = _hermite(count)
    part = 2.0 / (9.0 * freedom)
    chi = np.maximum(1.0 - part + points * math.sqrt(part), 0.02) ** 3
    return chi / (chi @ weights), weights


@lru_cache(maxsize=8)
def _hermite(count: int) -> tuple[Array, Array]:
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    return points, weights / weights.sum()


@lru_cache(maxsize=256)
def _cosine_points(freedom: float) -> tuple[Array, Array]:
    """Points and weights of the cosine of two independent directions, density (1 - t^2)^((freedom - 3) / 2)."""
    if freedom > 200.0:  # normal to well below 1 %
        points, weights = _hermite(6)
        return points / math.sqrt(freedom), weights
    half = max((freedom - 3.0) / 2.0, -0.99)
    points, weights = special.roots_jacobi(6, half, half)
    return points, weights / weights.sum()


def query_pairs(correlation: Array, freedom: float) -> tuple[Array, Array, Array, Array]:
    """Products of norms |p||p'|, cosines, and dots p . p' of two normal vectors in `freedom` dimensions, E|p|^2 = 1.

    p' = rho p + sqrt(1 - rho^2) w, w independent of p: Gauss points for |p|^2, |w|^2 and the cosine between p and w.
    Points [correlation, points] of each, and weights [points]. E p . p' is the correlation, exactly.
    """
    (chi, chi_weight), (other, other_weight) = norm_points(freedom, 4), norm_points(freedom, 3)
    turn, turn_weight = _cosine_points(freedom)
    rho = np.clip(correlation, -1.0, 1.0)[:, None, None, None]
    norm = np.sqrt(chi)[:, None, None]
    rest = np.sqrt((1.0 - rho * rho) * other[:, None])
    along = rho * norm + rest * turn
    second = np.sqrt(along * along + rest * rest * (1.0 - turn * turn))
    shape = (len(rho), -1)
    weights = chi_weight[:, None, None] * other_weight[:, None] * turn_weight
    cosine = along / np.maximum(second, 1e-12)
    return (norm * second).reshape(shape), cosine.reshape(shape), (norm * along).reshape(shape), weights.reshape(-1)
