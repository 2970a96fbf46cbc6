"""Activations: closed forms against brute-force quadrature, and what must hold for every input."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special

from clearhead.errors import UserError
from clearhead.signal.moments.activation import (
    ACTIVATIONS,
    SMOOTH,
    activation,
    activation_backward,
    activation_response,
)
from clearhead.signal.moments.arc_cosine import relu_raw_correlation
from clearhead.signal.moments.quadrature import smooth_response
from clearhead.signal.moments.relu import relu_centred_correlation
from clearhead.signal.moments.types import GradientMoments, Moments
from tests.signal.moments import given as drawn
from tests.signal.moments.two_dimensional import one, pair

DEVIATIONS = (0.5, 1.0, 2.0)
CORRELATIONS = (0.0, 0.2, 0.5, 0.8)
EXACT = 1e-10


def relu(x: np.ndarray) -> np.ndarray:
    return np.maximum(x, 0.0)


def step(x: np.ndarray) -> np.ndarray:
    return (x > 0.0).astype(float)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1.0 + special.erf(x / math.sqrt(2.0)))


def gelu_slope(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + special.erf(x / math.sqrt(2.0))) + x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


CLOSED = {"relu": (relu, step), "gelu": (gelu, gelu_slope)}


def check_against_brute_force(name: str, f, slope, mean: float, deviation: float, r: float, tolerance: float) -> None:
    found = activation_response(name, Moments.of(deviation**2, r, mean))
    average = one(f, mean, deviation)
    variance = one(lambda x: (f(x) - average) ** 2, mean, deviation)
    steep = one(lambda x: slope(x) ** 2, mean, deviation)
    assert found.mean == pytest.approx(average, rel=tolerance, abs=tolerance * deviation)
    assert found.variance == pytest.approx(variance, rel=tolerance)
    assert found.slope_square == pytest.approx(steep, rel=tolerance)
    assert found.covariance == pytest.approx(pair(f, mean, deviation, r) - average**2, abs=tolerance * variance)
    assert found.slope_product == pytest.approx(pair(slope, mean, deviation, r), abs=tolerance * steep)


@pytest.mark.parametrize("r", CORRELATIONS)
@pytest.mark.parametrize("deviation", DEVIATIONS)
@pytest.mark.parametrize("name", sorted(CLOSED))
def test_closed_forms_equal_quadrature(name: str, deviation: float, r: float) -> None:
    check_against_brute_force(name, *CLOSED[name], 0.0, deviation, r, EXACT)


@pytest.mark.parametrize(("h", "r"), [(-1.5, 0.3), (-0.4, 0.9), (0.7, -0.6), (0.7, 0.5), (2.5, 0.8)])
def test_relu_is_exact_at_any_mean(h: float, r: float) -> None:
    check_against_brute_force("relu", relu, step, 1.7 * h, 1.7, r, EXACT)


@pytest.mark.parametrize(("mean", "deviation", "r"), [(0.4, 1.0, 0.5), (-1.0, 3.0, 0.8), (0.0, 0.3, -0.7)])
@pytest.mark.parametrize("name", ["gelu", "gelu_tanh", "silu", "quick_gelu", "tanh", "sigmoid", "softplus"])
def test_quadrature_equals_brute_force(name: str, mean: float, deviation: float, r: float) -> None:
    check_against_brute_force(name, *SMOOTH[name], mean, deviation, r, 1e-8)


@pytest.mark.parametrize("r", [-0.9, 0.0, 0.3, 0.8])
@pytest.mark.parametrize("deviation", [0.01, 0.5, 2.0])
def test_the_two_ways_to_gelu_agree(deviation: float, r: float) -> None:
    closed = activation_response("gelu", Moments.of(deviation**2, r))
    numeric = smooth_response(*SMOOTH["gelu"], Moments.of(deviation**2, r))
    for name in ("mean", "variance", "covariance", "slope_square", "slope_product"):
        assert getattr(closed, name) == pytest.approx(getattr(numeric, name), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("name", sorted(SMOOTH))
def test_functions_and_slopes_are_torchs(name: str) -> None:
    x = torch.linspace(-6, 6, 97, dtype=torch.float64, requires_grad=True)
    ours, slope = SMOOTH[name]
    theirs = {
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda v: torch.nn.functional.gelu(v, approximate="tanh"),
        "silu": torch.nn.functional.silu,
        "quick_gelu": lambda v: v * torch.sigmoid(1.702 * v),
        "tanh": torch.tanh,
        "sigmoid": torch.sigmoid,
        "softplus": lambda v: torch.nn.functional.softplus(v, threshold=60),
        "relu2": lambda v: torch.relu(v) ** 2,
    }[name](x)
    (gradient,) = torch.autograd.grad(theirs.sum(), x)
    np.testing.assert_allclose(ours(x.detach().numpy()), theirs.detach().numpy(), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(slope(x.detach().numpy()), gradient.numpy(), rtol=1e-9, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ACTIVATIONS), drawn.MOMENTS)
def test_no_variable_beyond_its_variance(name: str, x: Moments) -> None:
    found = activation_response(name, x)
    room = 1e-9 * (found.variance + 1e-6 * x.second_moment)
    assert found.variance >= 0.0
    assert abs(found.covariance) <= found.variance + room
    assert found.slope_square >= 0.0
    assert abs(found.slope_product) <= found.slope_square * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ACTIVATIONS), drawn.VARIANCES, drawn.MEANS)
def test_equal_tokens_stay_equal(name: str, variance: float, mean: float) -> None:
    found = activation_response(name, Moments.of(variance, 1.0, mean))
    assert found.covariance == pytest.approx(found.variance, rel=1e-6, abs=1e-9 * (variance + mean**2))
    assert found.slope_product == pytest.approx(found.slope_square, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ACTIVATIONS), drawn.VARIANCES, drawn.MEANS, drawn.CORRELATIONS, drawn.CORRELATIONS)
def test_more_correlation_in_more_correlation_out(name: str, variance: float, mean: float, r: float, s: float) -> None:
    low, high = (activation_response(name, Moments.of(variance, c, mean)) for c in sorted((r, s)))
    assert low.covariance <= high.covariance + 1e-9 * (variance + mean**2)
    assert low.slope_product <= high.slope_product + 1e-9 * high.slope_square


@settings(max_examples=40, deadline=None)
@given(drawn.MOMENTS, st.floats(0.01, 100.0))
def test_relu_scales_with_its_input(x: Moments, scale: float) -> None:
    once = activation("relu", x)
    twice = activation("relu", Moments(scale * x.mean, scale**2 * x.variance, scale**2 * x.covariance))
    assert twice.mean == pytest.approx(scale * once.mean, rel=1e-9, abs=1e-12)
    assert twice.second_moment == pytest.approx(scale**2 * once.second_moment, rel=1e-9, abs=1e-12)
    assert twice.raw_covariance == pytest.approx(scale**2 * once.raw_covariance, rel=1e-7, abs=1e-12)


@given(drawn.VARIANCES, drawn.ANY_CORRELATIONS)
def test_raw_and_centred_correlations_of_relu(variance: float, r: float) -> None:
    out = activation("relu", Moments.of(variance, r))
    assert out.raw_correlation == pytest.approx(relu_raw_correlation(r), abs=1e-12)
    assert out.correlation == pytest.approx(relu_centred_correlation(r), abs=1e-12)
    assert relu_raw_correlation(r) >= relu_centred_correlation(r) - 1e-12
    assert relu_raw_correlation(r) >= r - 1e-12  # a layer pulls tokens together


def test_the_kernels_known_values() -> None:
    assert relu_raw_correlation(0.0) == pytest.approx(1 / math.pi, rel=1e-15)
    assert relu_raw_correlation(1.0) == 1.0
    assert relu_raw_correlation(-1.0) == pytest.approx(0.0, abs=1e-15)
    assert relu_centred_correlation(0.0) == 0.0
    assert relu_centred_correlation(1.0) == pytest.approx(1.0, rel=1e-15)


def test_small_correlations_keep_their_digits() -> None:
    # Slopes at r = 0 are squared means of the slope: 1/4 for ReLU and GELU alike.
    for name in CLOSED:
        out = activation(name, Moments.of(1.0, 1e-13))
        assert out.covariance == pytest.approx(0.25e-13, rel=1e-9)


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
def test_variance_goes_to_zero(name: str) -> None:
    # Near a point the function is its tangent.
    for mean in (-0.8, 1.3):
        out = activation_response(name, Moments.of(1e-14, 0.6, mean))
        still = activation_response(name, Moments(mean, 0.0, 0.0))
        assert still.variance == 0.0
        assert out.mean == pytest.approx(still.mean, rel=1e-9, abs=1e-15)
        assert out.slope_square == pytest.approx(still.slope_square, rel=1e-6)
        assert out.variance == pytest.approx(1e-14 * still.slope_square, rel=1e-4, abs=1e-30)
        assert out.covariance == pytest.approx(0.6e-14 * still.slope_square, rel=1e-4, abs=1e-30)


def test_large_gelu_is_relu() -> None:
    for mean in (0.0, 300.0):
        big = Moments.of(1e8, 0.7, mean)
        gelu_out, relu_out = activation_response("gelu", big), activation_response("relu", big)
        assert gelu_out.mean == pytest.approx(relu_out.mean, rel=1e-4)
        assert gelu_out.variance == pytest.approx(relu_out.variance, rel=1e-4)
        assert gelu_out.covariance == pytest.approx(relu_out.covariance, rel=1e-4)
        assert gelu_out.slope_product == pytest.approx(relu_out.slope_product, rel=1e-3)


def test_backward_multiplies() -> None:
    x, g = Moments.of(1.7, 0.4), GradientMoments.of(3.0, 0.25)
    back = activation_backward("relu", g, x)
    assert back.variance == pytest.approx(1.5)
    assert back.correlation == pytest.approx((0.5 + math.asin(0.4) / math.pi) * 0.25)


def test_rounding_is_forgiven_and_nonsense_is_not() -> None:
    for name in ("relu", "gelu", "silu"):
        out = activation(name, Moments(0.0, 1.0, 1.0 + 1e-12))
        assert out.covariance == pytest.approx(out.variance, rel=1e-12)
        activation(name, Moments(0.3, 1.0, -1.0 - 1e-12))
        for bad in (Moments(0.0, 1.0, 1.1), Moments(0.0, -1.0, 0.0), Moments(math.nan, 1.0, 0.0)):
            with pytest.raises(ValueError, match="expected"):
                activation(name, bad)


def test_a_misspelt_name_is_one_line() -> None:
    with pytest.raises(UserError, match="did you mean 'gelu'"):
        activation("gelo", Moments.of(1.0, 0.0))


def test_hugging_face_names() -> None:
    x = Moments.of(0.8, 0.3, 0.1)
    assert activation("gelu_new", x) == activation("gelu_tanh", x)
    assert activation("swish", x) == activation("silu", x)


def test_a_thousand_layers_are_cheap() -> None:
    # Different moments in every layer, so that no answer is remembered. Generous: other work shares the machine.
    for name, most in (("relu", 0.3), ("gelu", 0.3), ("silu", 1.5)):
        start = time.process_time()
        for layer in range(1000):
            x = Moments.of(1.0 + 1e-3 * layer, 0.5 + 4e-4 * layer)
            activation_backward(name, GradientMoments.of(1.0, 0.5), Moments.of(activation(name, x).variance, 0.5))
        assert time.process_time() - start < most, name
