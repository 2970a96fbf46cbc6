"""Embedding, linear, dropout, residual, gated units: identities and small simulations."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clearhead.signal.moments.activation import activation, activation_response
from clearhead.signal.moments.dropout import dropout, dropout_backward
from clearhead.signal.moments.embedding import (
    embedding,
    published_correlation,
    repetition,
    segment_repetition,
    zipf_repetition,
)
from clearhead.signal.moments.gated import gated, gated_backward
from clearhead.signal.moments.linear import linear, linear_backward, weight_gradient
from clearhead.signal.moments.residual import residual, residual_backward, scaled
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import Matrix
from tests.signal.moments import given as drawn

# --- embedding


def test_embedding_sums_tables() -> None:
    x = embedding((0.3, 0.2, 0.5), (0.01, 0.0, 2 / 3))
    assert (x.mean, x.variance) == (0.0, pytest.approx(1.0))
    assert x.covariance == pytest.approx(0.3 * 0.01 + 0.5 * 2 / 3)


def test_the_published_correlation_is_three_equal_tables() -> None:
    # The formula at V = 30522, without and with Euler's constant. The authors' code (arXiv 2403.09635) has 0.221.
    assert published_correlation(30522) == pytest.approx(0.2274, abs=5e-5)
    assert published_correlation(30522, with_euler=True) == pytest.approx(0.2268, abs=5e-5)
    ours = embedding((0.3, 0.3, 0.3), (zipf_repetition(30522), 0.0, segment_repetition())).correlation
    assert ours == pytest.approx(published_correlation(30522, with_euler=True), rel=1e-3)
    two = embedding((1.0, 1.0), (zipf_repetition(30522), 0.0)).correlation
    assert two == pytest.approx(0.0077, rel=0.12)  # the logarithm without Euler's constant is that much high


def test_zipf_is_the_sum() -> None:
    weights = [1 / i for i in range(1, 51)]
    assert zipf_repetition(50) == pytest.approx(sum(w * w for w in weights) / sum(weights) ** 2)
    assert repetition([3, 1]) == pytest.approx((9 + 1) / 16)
    assert repetition(torch.ones(40).tolist()) == pytest.approx(1 / 40)


@given(st.integers(2, 60))
def test_a_uniform_cut_gives_two_thirds_at_every_length(tokens: int) -> None:
    same = [cut * (cut - 1) + (tokens - cut) * (tokens - cut - 1) for cut in range(tokens + 1)]
    assert sum(same) / len(same) / (tokens * (tokens - 1)) == pytest.approx(segment_repetition())


def test_bad_tables_are_refused() -> None:
    for variances, correlations in (((1.0,), ()), ((-1.0,), (0.0,)), ((1.0,), (1.5,))):
        with pytest.raises(ValueError, match="expected"):
            embedding(variances, correlations)
    for weights in ([], [0.0], [-1.0, 2.0], [math.nan]):
        with pytest.raises(ValueError, match="expected"):
            repetition(weights)


# --- linear


@given(drawn.MOMENTS, st.floats(1e-4, 10.0))
def test_linear_sees_raw_moments(x: Moments, variance: float) -> None:
    y = linear(x, Matrix(7, 5, variance))
    assert y.mean == 0.0
    assert y.variance == pytest.approx(7 * variance * x.second_moment)
    assert y.correlation == pytest.approx(x.raw_correlation, abs=1e-12)


def test_a_bias_is_shared_by_all_tokens() -> None:
    y = linear(Moments.of(1.0, 0.0), Matrix(10, 10, 0.1, bias_variance=3.0))
    assert (y.variance, y.covariance) == (pytest.approx(4.0), pytest.approx(3.0))


def test_linear_backward_keeps_the_correlation() -> None:
    back = linear_backward(GradientMoments.of(2.0, 0.3), Matrix(7, 5, 0.5))
    assert (back.variance, back.correlation) == (pytest.approx(5.0), pytest.approx(0.3))


@pytest.mark.parametrize("tokens", [1, 6])
def test_weight_gradient_is_autograds(tokens: int) -> None:
    x, g, matrix = Moments.of(1.5, 0.4, 0.7), GradientMoments.of(0.8, 0.6), Matrix(40, 30, 0.1)
    b = 4000

    def shared(mean: float, variance: float, r: float, width: int) -> torch.Tensor:
        common, own = torch.randn(b, 1, width), torch.randn(b, tokens, width)
        return mean + math.sqrt(variance) * (math.sqrt(r) * common + math.sqrt(1 - r) * own)

    x_bti, g_bto = shared(x.mean, x.variance, 0.4, 40), shared(0.0, g.variance, 0.6, 30)
    w_boi = torch.zeros(b, 30, 40, requires_grad=True)
    (by_w,) = torch.autograd.grad(((x_bti @ w_boi.mT) * g_bto).sum(), w_boi)
    assert weight_gradient(g, x, matrix, tokens) == pytest.approx(float(by_w.square().sum()) / b, rel=0.02)


# --- dropout and residual


@given(drawn.MOMENTS, drawn.PROBABILITIES)
def test_dropout_keeps_mean_and_covariance(x: Moments, p: float) -> None:
    y = dropout(x, p)
    assert (y.mean, y.covariance) == (x.mean, x.covariance)
    assert y.variance >= x.variance
    assert y.second_moment == pytest.approx(x.second_moment / (1 - p))


@given(drawn.CENTRED, drawn.GRADIENTS, drawn.PROBABILITIES)
def test_dropout_lowers_correlations_by_what_it_drops(x: Moments, g: GradientMoments, p: float) -> None:
    assert dropout(x, p).correlation == pytest.approx(x.correlation * (1 - p), abs=1e-12)
    assert dropout_backward(g, p).correlation == pytest.approx(g.correlation * (1 - p), abs=1e-12)
    assert dropout_backward(g, p).covariance == g.covariance


@given(drawn.MOMENTS, drawn.PROBABILITIES, drawn.PROBABILITIES)
def test_two_dropouts_are_one(x: Moments, p: float, q: float) -> None:
    both, once = dropout(dropout(x, p), q), dropout(x, 1 - (1 - p) * (1 - q))
    assert both.variance == pytest.approx(once.variance, rel=1e-9)


@pytest.mark.parametrize("p", [-0.1, 1.0, math.nan])
def test_dropout_refuses_what_is_no_probability(p: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        dropout(Moments.of(1.0, 0.0), p)
    with pytest.raises(ValueError, match="probability"):
        dropout_backward(GradientMoments.of(1.0, 0.0), p)


@given(drawn.MOMENTS, drawn.MOMENTS, st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_residual_adds(stream: Moments, branch: Moments, keep: float, add: float) -> None:
    y = residual(stream, branch, keep, add)
    assert y.mean == pytest.approx(keep * stream.mean + add * branch.mean)
    assert y.variance == pytest.approx(keep**2 * stream.variance + add**2 * branch.variance)
    assert y.covariance == pytest.approx(keep**2 * stream.covariance + add**2 * branch.covariance)
    assert scaled(stream, keep) == residual(stream, branch, keep, 0.0)


def test_residual_backward_splits() -> None:
    below, by_branch = residual_backward(GradientMoments.of(2.0, 0.5), 0.9, 0.3)
    assert (below.variance, by_branch.variance) == (pytest.approx(1.62), pytest.approx(0.18))
    assert below.correlation == pytest.approx(0.5)
    assert by_branch.correlation == pytest.approx(0.5)


# --- gated


@given(st.sampled_from(["relu", "gelu", "silu"]), drawn.MOMENTS, drawn.MOMENTS)
def test_a_product_of_raw_moments(name: str, gate: Moments, up: Moments) -> None:
    f, y = activation(name, gate), gated(name, gate, up)
    size = f.second_moment * up.second_moment
    assert y.second_moment == pytest.approx(size, rel=1e-9)
    assert y.raw_covariance == pytest.approx(f.raw_covariance * up.raw_covariance, abs=1e-9 * size)
    assert abs(y.covariance) <= y.variance + 1e-9 * size
    assert y.variance >= 0.0


def test_a_constant_up_is_no_gate() -> None:
    gate, g = Moments.of(1.3, 0.4, 0.2), GradientMoments.of(2.0, 0.3)
    assert gated("silu", gate, Moments(1.0, 0.0, 0.0)) == activation("silu", gate)
    by_gate, by_up = gated_backward("silu", g, gate, Moments(1.0, 0.0, 0.0))
    response = activation_response("silu", gate)
    assert by_gate == response.backward(g)
    assert by_up.variance == pytest.approx(2.0 * response.output.second_moment)
    assert by_up.covariance == pytest.approx(0.6 * response.output.raw_covariance)
