"""Gradients by token: conservation, limits, and a written-out causal average with autograd."""

import numpy as np
import pytest
import torch

from clearhead.signal.moments.positions import GROUPS, PositionGradient, Profile, groups_of, row_squares
from clearhead.signal.moments.types import GradientMoments


def flat(tokens: int) -> tuple[float, float]:
    """Mean participation and overlap of equal causal weights."""
    weights = torch.tril(torch.ones(tokens, tokens, dtype=torch.float64))
    weights /= weights.sum(dim=1, keepdim=True)
    gram = weights @ weights.T
    squares = float(gram.diagonal().mean())
    overlap = float((gram.sum() - gram.diagonal().sum()) / (tokens * (tokens - 1)))
    return squares, overlap


@pytest.mark.parametrize("tokens", [1, 2, 7, GROUPS, GROUPS + 1, 300, 5000])
def test_groups_cover_every_token(tokens: int) -> None:
    groups = groups_of(tokens)
    assert groups.tokens == tokens
    assert len(groups.size_a) <= GROUPS + 1
    assert groups.seen_a[0] == 1.0


@pytest.mark.parametrize("correlation", [0.0, 0.3])
def test_equal_weights_are_exact(correlation: float) -> None:
    """A^T G A for the causal average, entry by entry."""
    tokens = 24
    squares, overlap = flat(tokens)
    g = PositionGradient.even(tokens, GradientMoments.of(2.0, correlation))
    found = g.through_values(squares=squares, overlap=overlap)

    weights = np.tril(np.ones((tokens, tokens))) / np.arange(1, tokens + 1)[:, None]
    given = np.full((tokens, tokens), 2.0 * correlation)
    np.fill_diagonal(given, 2.0)
    truth = weights.T @ given @ weights
    np.testing.assert_allclose(found.variance_a, np.diag(truth), rtol=1e-9)
    off = ~np.eye(tokens, dtype=bool)
    np.testing.assert_allclose(found.covariance_ab[off], truth[off], rtol=1e-9)


def test_repeated_mixing_keeps_the_sum() -> None:
    """Rows of weights sum to 1, so E |sum_j dv_j|^2 = E |sum_i g_i|^2, however often."""
    tokens = 40
    squares, overlap = flat(tokens)
    g = PositionGradient.even(tokens, GradientMoments.of(1.0, 0.1))

    def total(x: PositionGradient) -> float:
        m = x.moments
        return tokens * m.variance + tokens * (tokens - 1) * m.covariance

    before = total(g)
    for _ in range(6):
        g = g.through_values(squares=squares, overlap=overlap)
    assert total(g) == pytest.approx(before, rel=1e-9)
    assert g.variance_a[0] > 100 * g.variance_a[-1]  # it piles up on the first token


def test_random_weights_meet_a_simulation() -> None:
    """Softmax of independent normal scores of deviation 1, dropout of 0.2 on the weights."""
    tokens, p, draws = 16, 0.2, 20000
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(draws, tokens, tokens, generator=generator, dtype=torch.float64)
    hidden = torch.triu(torch.ones(tokens, tokens, dtype=torch.bool), 1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    squares = float(weights.square().sum(-1).mean())
    gram = weights @ weights.mT
    overlap = float((gram.sum((1, 2)) - gram.diagonal(dim1=1, dim2=2).sum(1)).mean() / (tokens * (tokens - 1)))
    kept = (torch.rand(weights.shape, generator=generator, dtype=torch.float64) >= p) / (1 - p)
    noise = torch.randn(draws, tokens, 1, generator=generator, dtype=torch.float64)
    shared = torch.randn(draws, 1, 1, generator=generator, dtype=torch.float64)
    g = 0.25**0.5 * shared + 0.75**0.5 * noise
    back = ((weights * kept).mT @ g).squeeze(-1)
    truth = back.square().mean(0).numpy()

    given = PositionGradient.even(tokens, GradientMoments.of(1.0, 0.25))
    sum_square = 1.0 + squares * p / (1.0 - p)
    found = given.through_values(squares=squares / (1 - p), overlap=overlap, dropped=p, sum_square=sum_square)
    np.testing.assert_allclose(found.variance_a, truth, rtol=0.15)
    assert found.moments.variance == pytest.approx(truth.mean(), rel=0.03)


@pytest.mark.parametrize("tokens", [200, 1000])
def test_grouping_changes_little(tokens: int) -> None:
    """The mean of many grouped tokens against single ones, after two mixes and a norm."""
    squares, overlap = flat(tokens)
    start = GradientMoments.of(1.0, 0.05)
    grouped = PositionGradient.even(tokens, start)
    for _ in range(2):
        grouped = grouped.through_values(squares=squares, overlap=overlap)
    weights = np.tril(np.ones((tokens, tokens))) / np.arange(1, tokens + 1)[:, None]
    truth = np.full((tokens, tokens), 0.05)
    np.fill_diagonal(truth, 1.0)
    for _ in range(2):
        truth = weights.T @ truth @ weights
    assert grouped.moments.variance == pytest.approx(np.diag(truth).mean(), rel=0.1)
    assert grouped.variance_a[0] == pytest.approx(truth[0, 0], rel=0.1)


def test_row_squares_have_the_asked_mean() -> None:
    groups = groups_of(50)
    for mean in (float(groups.size_a @ (1.0 / groups.seen_a)) / 50, 0.15, 0.2):
        rows = row_squares(groups, mean)
        assert float(groups.size_a @ rows) / 50 == pytest.approx(mean, rel=1e-6)
        assert rows[0] == 1.0


def test_profiles_have_mean_one() -> None:
    profile = Profile.of_mix(70, shared=0.1, own=0.9, squares=0.1)
    assert float(profile.groups.size_a @ profile.share_a) / 70 == pytest.approx(1.0)
    assert profile.share_a[0] > profile.share_a[-1]
    mixed = Profile.even(70).mixed(1.0, profile, 0.5)
    assert float(mixed.groups.size_a @ mixed.share_a) / 70 == pytest.approx(1.0)
    assert 1.0 < mixed.share_a[0] < profile.share_a[0]
