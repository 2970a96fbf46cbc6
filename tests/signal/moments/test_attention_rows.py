"""Rows of softmax weights: the integrals against brute-force quadrature and sampling; the overlap of two rows."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clearhead.signal.moments.laplace import largest_weight, nested_rows, row_statistics
from clearhead.signal.moments.rows import (
    END,
    ENTROPY,
    FLAT,
    JACOBIAN,
    LARGEST,
    SQUARES,
    Overlap,
    row_table,
)

SPREADS = (0.3, 1.0, 2.5, 4.0, 8.0)


def normal_grid(step: float = 0.02, reach: float = 9.0) -> tuple[np.ndarray, np.ndarray]:
    u = np.arange(-reach, reach + step / 2, step)
    return u, np.exp(-u * u / 2) * step / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("spread", SPREADS)
def test_two_keys_equal_direct_quadrature(spread: float) -> None:
    u, w = normal_grid(0.04)
    one, two = u[:, None], u[None, :]
    weight = w[:, None] * w[None, :]
    a = 1.0 / (1.0 + np.exp(spread * (two - one)))
    b = 1.0 - a
    squares, mean_u = a * a + b * b, a * one + b * two
    found = row_statistics(spread, np.array([2.0]))
    expected = {
        "squares": squares,
        "cubes": a**3 + b**3,
        "fourths": a**4 + b**4,
        "squares_squared": squares**2,
        "pull": mean_u**2,
        "square": a * one**2 + b * two**2,
        "lean": (a * (one - mean_u)) ** 2 + (b * (two - mean_u)) ** 2,
        "log_sum": np.logaddexp(spread * one, spread * two),
    }
    for name, integrand in expected.items():
        assert getattr(found, name)[0] == pytest.approx(float((weight * integrand).sum()), rel=1e-6, abs=1e-8), name
    assert largest_weight(spread, np.array([2.0]))[0] == pytest.approx(
        float((weight * np.maximum(a, b)).sum()), rel=1e-2
    )


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("keys", [7, 60])
def test_many_keys_equal_sampling(spread: float, keys: int) -> None:
    u = np.random.default_rng(0).standard_normal((40_000, keys))
    e = np.exp(spread * u)
    a = e / e.sum(1, keepdims=True)
    mean_u = (a * u).sum(1)
    found = row_statistics(spread, np.array([float(keys)]))
    samples = {
        "squares": (a**2).sum(1),
        "cubes": (a**3).sum(1),
        "fourths": (a**4).sum(1),
        "squares_squared": (a**2).sum(1) ** 2,
        "pull": mean_u**2,
        "square": (a * u**2).sum(1),
        "lean": (a**2 * (u - mean_u[:, None]) ** 2).sum(1),
        "log_sum": np.log(e.sum(1)),
    }
    for name, sample in samples.items():
        error = 5.0 * sample.std() / math.sqrt(len(sample))
        assert abs(getattr(found, name)[0] - sample.mean()) < error + 1e-4 * abs(sample.mean()), name
    assert largest_weight(spread, np.array([float(keys)]))[0] == pytest.approx(a.max(1).mean(), rel=0.02)


@pytest.mark.parametrize("spread", SPREADS)
def test_nested_rows_equal_sampling(spread: float) -> None:
    short, long = 5, 40
    e = np.exp(spread * np.random.default_rng(1).standard_normal((60_000, long)))
    b = (e / e.sum(1, keepdims=True))[:, :short]
    a = e[:, :short] / e[:, :short].sum(1, keepdims=True)
    product = (a * b).sum(1)
    jacobians = product - (a * a * b).sum(1) - (a * b * b).sum(1) + product**2
    found = nested_rows(spread, short, np.array([float(short), float(long)]))
    for value, sample in ((found.product[1], product), (found.jacobians[1], jacobians)):
        assert abs(value - sample.mean()) < 5.0 * sample.std() / math.sqrt(len(sample)) + 5e-3 * sample.mean()
    own = row_statistics(spread, np.array([float(short)]))
    assert found.product[0] == pytest.approx(own.squares[0], rel=5e-3)


@pytest.mark.parametrize("keys", [1, 2, 50])
@pytest.mark.parametrize("causal", [False, True])
def test_the_limits_of_equal_weights_and_of_one_winner(keys: int, causal: bool) -> None:
    table = row_table(keys, causal)
    numbers = np.arange(1, keys + 1) if causal else np.array([keys])
    flat, won = table.rows(np.array([0.0]))[0], table.rows(np.array([500.0]))[0]
    assert flat[SQUARES] == pytest.approx((1 / numbers).mean(), rel=4e-3)
    assert flat[ENTROPY] == pytest.approx(np.log(numbers).mean(), rel=2e-3, abs=1e-6)
    assert flat[JACOBIAN] == pytest.approx((1 / numbers - 1 / numbers**2).mean(), rel=2e-2, abs=1e-6)
    assert won[SQUARES] > 0.99
    assert won[LARGEST] > 0.99
    assert won[JACOBIAN] < 0.01
    if keys > 1:
        i = np.arange(1, keys + 1)
        pairs = 1 / np.maximum.outer(i, i) if causal else np.full((keys, keys), 1 / keys)
        mean = (pairs.sum() - np.trace(pairs)) / (keys * (keys - 1))
        assert table.pairs(np.array([0.0]))[0, FLAT] == pytest.approx(mean, rel=1e-2)


def test_saturation_is_monotone() -> None:
    columns = row_table(64, True).rows(np.linspace(0.0, 60.0, 200))
    assert (np.diff(columns[:, SQUARES]) > -1e-9).all()
    assert (np.diff(columns[:, LARGEST]) > -1e-3).all()
    assert (np.diff(columns[:, ENTROPY]) < 1e-6).all()


@pytest.mark.parametrize("spread", SPREADS)
@pytest.mark.parametrize("rho", [-0.3, 0.0, 0.2, 0.5, 0.8, 0.95, 1.0])
def test_the_overlap_of_two_keys_equals_quadrature(spread: float, rho: float) -> None:
    # Of two keys only the difference of the scores counts, of variance 2 s^2.
    u, w = normal_grid(0.05)
    one = math.sqrt(2.0) * spread * u[:, None]
    two = rho * one + math.sqrt(max(1 - rho**2, 0.0)) * math.sqrt(2.0) * spread * u[None, :]
    a, b = 1 / (1 + np.exp(-one)), 1 / (1 + np.exp(-two))
    weight = w[:, None] * w[None, :]
    exact = float((weight * (a * b + (1 - a) * (1 - b))).sum())
    slope = float((weight * 4 * a * (1 - a) * b * (1 - b)).sum()) * spread**2
    overlap = Overlap.of(row_table(2, False).pairs(np.array([spread])))
    assert overlap.value(np.array([rho]))[0] == pytest.approx(exact, rel=0.01)
    assert overlap.slope(np.array([rho]))[0] == pytest.approx(slope, rel=0.12)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("spread", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("rho", [-0.2, 0.1, 0.5, 0.9])
def test_the_overlap_of_many_keys_equals_sampling(causal: bool, spread: float, rho: float) -> None:
    keys, count = 48, 12_000
    rng = np.random.default_rng(2)
    u = rng.standard_normal((count, keys))
    v = rho * u + math.sqrt(1 - rho**2) * rng.standard_normal((count, keys))
    rows = rng.integers(1, keys + 1, (2, count)) if causal else np.full((2, count), keys)
    if causal:
        different = rows[0] != rows[1]
        u, v, rows = u[different], v[different], rows[:, different]

    def weights(z: np.ndarray, length: np.ndarray) -> np.ndarray:
        e = np.exp(spread * z) * (np.arange(keys) < length[:, None])
        return e / e.sum(1, keepdims=True)

    a, b = weights(u, rows[0]), weights(v, rows[1])
    shared = (a * b).sum(1)
    jacobians = spread**2 * (shared - (a * a * b).sum(1) - (a * b * b).sum(1) + shared**2)
    overlap = Overlap.of(row_table(keys, causal).pairs(np.array([spread])))
    for found, sample in (
        (overlap.value(np.array([rho]))[0], shared),
        (overlap.slope(np.array([rho]))[0], jacobians),
    ):
        noise = 3.5 * sample.std() / math.sqrt(len(sample))
        assert abs(found - sample.mean()) < 0.05 * sample.mean() + noise


def test_a_blend_of_a_row_with_itself_is_the_row() -> None:
    overlap = Overlap.of(row_table(40, False).pairs(np.array([3.0])))
    rho = np.array([0.6])
    assert overlap.blend(overlap).value(rho) == pytest.approx(overlap.value(rho), rel=1e-12)


def test_a_blend_of_two_deviations_equals_sampling() -> None:
    u = np.random.default_rng(3).standard_normal((20_000, 40))
    v = 0.6 * u + 0.8 * np.random.default_rng(4).standard_normal(u.shape)
    a, b = np.exp(u), np.exp(3 * v)
    sample = ((a / a.sum(1, keepdims=True)) * (b / b.sum(1, keepdims=True))).sum(1).mean()
    table = row_table(40, False)
    blend = Overlap.of(table.pairs(np.array([1.0]))).blend(Overlap.of(table.pairs(np.array([3.0]))))
    assert blend.value(np.array([0.6]))[0] == pytest.approx(sample, rel=0.03)


def test_the_mean_of_an_overlap_is_its_integral() -> None:
    overlap = Overlap.of(row_table(40, False).pairs(np.array([3.0])))
    t = (np.arange(2000) + 0.5) / 2000
    assert overlap.mean(np.array([0.9]))[0] == pytest.approx(overlap.value(0.9 * t).mean(), rel=1e-5)


def test_the_end_of_the_overlap_is_the_row_itself() -> None:
    table = row_table(30, False)
    for spread in (0.5, 2.0, 6.0):
        end = table.pairs(np.array([spread]))[0, END]
        assert end == pytest.approx(table.rows(np.array([spread]))[0, SQUARES], rel=2e-3)


def test_a_window_shorter_than_the_sequence() -> None:
    table = row_table(100, True, 10)
    lengths = np.minimum(np.arange(1, 101), 10)
    assert table.inverse_keys == pytest.approx((1 / lengths).mean(), rel=1e-3)
    assert table.rows(np.array([0.0]))[0, SQUARES] == pytest.approx((1 / lengths).mean(), rel=1e-3)
    assert row_table(100, True, 100) is not table


@pytest.mark.parametrize("keys", [0, -3, 1 << 21])
def test_too_few_or_too_many_keys(keys: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to"):
        row_table(keys, False)
