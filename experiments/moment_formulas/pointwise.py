"""The cases without weights: activations, a gated product, norms, dropout.

Grids keep the ranges of the authors' own where these are known; of ReLU and GELU only the
correlations are.

Shapes: b sequences, t tokens, w features.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clearhead.signal.moments.activation import activation, activation_backward
from clearhead.signal.moments.dropout import dropout, dropout_backward
from clearhead.signal.moments.gated import gated, gated_backward
from clearhead.signal.moments.norm import (
    layer_norm,
    layer_norm_backward,
    layer_norm_feature_correlation,
    rms_norm,
    rms_norm_backward,
)
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import Norm
from experiments.moment_formulas.case import Case, Params
from experiments.moment_formulas.draw import equicorrelated, moments_of, second_moments_of
from experiments.moment_formulas.inputs import (
    BACKWARD,
    CORRELATIONS,
    DECADE,
    DEVIATIONS,
    FORWARD,
    GRADIENT_GRID,
    POINTS,
    THIRDS,
    WIDTHS,
    Published,
    as_quantities,
    drawn,
    given,
    measured,
)

# --- activations ------------------------------------------------------------------------------------------------------

TORCH: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}


def activation_case(
    name: str, label: str, means: tuple[float, ...], note: str, published: Published | None = None
) -> Case:
    """f at one name; `means` are in standard deviations of the input."""

    def scaled(params: Params) -> dict[str, float]:
        return {**params, "mu": params["mu_over_sigma"] * params["sigma"]}

    def predict(params: Params) -> dict[str, float]:
        x, g = given(scaled(params))
        return as_quantities(activation(name, x), activation_backward(name, g, x))

    def simulate(params: Params, generator: Generator) -> dict[str, float]:
        x_bt1, g_bt1 = drawn(scaled(params), (300_000, POINTS, 1), None, generator)
        return measured(x_bt1, TORCH[name](x_bt1), g_bt1)

    grid = {
        "mu_over_sigma": means,
        "sigma": DEVIATIONS,
        "r": CORRELATIONS,
        "sigma_g": (0.1, 1.0, 10.0),
        "r_g": CORRELATIONS,
    }
    return Case(label, grid, predict, simulate, FORWARD + BACKWARD, note, published or {})


# --- gated ------------------------------------------------------------------------------------------------------------


def predict_swiglu(params: Params) -> dict[str, float]:
    """SwiGLU of a gate and an up that share nothing but the sequence."""
    gate = Moments.of(params["sigma"] ** 2, params["r"], params["mu"])
    up = Moments.of(params["sigma_up"] ** 2, params["r_up"], params["mu_up"])
    g = GradientMoments.of(params["sigma_g"] ** 2, params["r_g"])
    by_gate, by_up = gated_backward("silu", g, gate, up)
    return {
        **as_quantities(gated("silu", gate, up), by_gate),
        "up_gradient_variance": by_up.variance,
        "up_gradient_covariance": by_up.covariance,
    }


def simulate_swiglu(params: Params, generator: Generator) -> dict[str, float]:
    """The same, drawn."""
    size = (500_000, POINTS, 1)
    gate, g = drawn(params, size, None, generator)
    up = equicorrelated(size, params["mu_up"], params["sigma_up"] ** 2, params["r_up"], generator).requires_grad_()
    y = F.silu(gate) * up
    by_gate, by_up = torch.autograd.grad((y * g).sum(), (gate, up))
    return {
        **moments_of(y.detach()),
        **second_moments_of(by_gate, "gradient_"),
        **second_moments_of(by_up, "up_gradient_"),
    }


# --- norms and dropout ------------------------------------------------------------------------------------------------


def predict_layer_norm(params: Params) -> dict[str, float]:
    """LayerNorm with its constants at the start: gain 1, shift 0."""
    x, g = given(params)
    width = int(params["width"])
    norm = Norm("layer", eps=0.0)
    found = as_quantities(layer_norm(x, width, norm), layer_norm_backward(g, x, width, norm))
    return {**found, "feature_covariance": layer_norm_feature_correlation(width) * found["variance"]}


def simulate_layer_norm(params: Params, generator: Generator) -> dict[str, float]:
    """torch's own; the covariance of features by the square of their sum."""
    width = int(params["width"])
    x_btw, g_btw = drawn(params, (1_000_000 // (POINTS * width), POINTS, width), None, generator)
    y_btw = F.layer_norm(x_btw, (width,), eps=0.0)
    found = measured(x_btw, y_btw, g_btw)
    y = y_btw.detach().double()
    pairs = (y.sum(-1).square() - y.square().sum(-1)).mean() / (width * (width - 1))
    return {**found, "feature_covariance": float(pairs)}


def predict_rms_norm(params: Params) -> dict[str, float]:
    """RMSNorm with its gain at the start, 1."""
    x, g = given(params)
    width = int(params["width"])
    norm = Norm("rms", eps=0.0)
    return as_quantities(rms_norm(x, width, norm), rms_norm_backward(g, x, width, norm))


def simulate_rms_norm(params: Params, generator: Generator) -> dict[str, float]:
    """torch's own. An eps of 0 would mean the dtype's; the smallest number is as good as none."""
    width = int(params["width"])
    x_btw, g_btw = drawn(params, (1_000_000 // (POINTS * width), POINTS, width), None, generator)
    return measured(x_btw, F.rms_norm(x_btw, (width,), eps=1e-30), g_btw)


def predict_dropout(params: Params) -> dict[str, float]:
    """Inverted dropout."""
    x, g = given(params)
    return as_quantities(dropout(x, params["p"]), dropout_backward(g, params["p"]))


def simulate_dropout(params: Params, generator: Generator) -> dict[str, float]:
    """The definition: entries kept at random, divided by the share that is kept (torch's own takes no generator)."""
    x, g = drawn(params, (250_000, POINTS, 1), None, generator)
    kept = torch.rand(x.shape, generator=generator) >= params["p"]
    return measured(x, x * kept / (1.0 - params["p"]), g)


# --- all of them ------------------------------------------------------------------------------------------------------

STANDARD = "Mean 0, as behind a linear map without bias, and as in the authors' grid."
ANY_MEAN = "A mean of up to two standard deviations; ours."

PUBLISHED_RELU = {
    "mean": (0.3, 1.3, 2.3),
    "variance": (0.5, 1.9, 3.4),
    "covariance": (0.3, 1.6, 3.1),
    "gradient_variance": (0.6, 1.5, 2.6),
    "gradient_covariance": (0.2, 1.1, 2.3),
}
PUBLISHED_GELU = {
    "mean": (0.1, 1.0, 2.4),
    "variance": (0.2, 0.6, 1.3),
    "covariance": (0.1, 0.5, 1.2),
    "gradient_variance": (0.2, 0.6, 1.1),
    "gradient_covariance": (0.1, 0.4, 0.9),
}

CASES = (
    activation_case("relu", "relu", (0.0,), STANDARD, PUBLISHED_RELU),
    activation_case("relu", "relu_any_mean", (-1.0, 1.0, 2.0), ANY_MEAN),
    activation_case("gelu", "gelu", (0.0,), STANDARD, PUBLISHED_GELU),
    activation_case("gelu", "gelu_any_mean", (-1.0, 1.0, 2.0), ANY_MEAN + " By quadrature."),
    activation_case("silu", "silu", (-1.0, 0.0, 1.0), ANY_MEAN + " By quadrature."),
    Case(
        name="swiglu",
        grid={
            "mu": (0.0, 0.5),
            "sigma": (0.316, 1.0, 3.16),
            "r": CORRELATIONS,
            "mu_up": (0.0, 0.5),
            "sigma_up": (0.316, 1.0, 3.16),
            "r_up": CORRELATIONS,
            "sigma_g": (1.0,),
            "r_g": CORRELATIONS,
        },
        predict=predict_swiglu,
        simulate=simulate_swiglu,
        quantities=(*FORWARD, *BACKWARD, "up_gradient_variance", "up_gradient_covariance"),
        note="silu(gate) * up alone, gate and up independent; `gradient` is by the gate. Ours.",
    ),
    Case(
        name="layer_norm",
        grid={
            "mu": (-10.0, -1.0, 0.0, 0.316, 3.3),
            "sigma": DECADE,
            "r": THIRDS,
            "width": WIDTHS,
            **GRADIENT_GRID,
        },
        predict=predict_layer_norm,
        simulate=simulate_layer_norm,
        quantities=(*FORWARD, "feature_covariance", *BACKWARD),
        note="With our terms of order 1/width.",
        published={
            "variance": (0.0, 0.0, 0.0),
            "covariance": (0.1, 0.5, 1.0),
            "feature_covariance": (0.0, 0.0, 0.0),
            "gradient_variance": (0.4, 1.5, 3.2),
            "gradient_covariance": (0.2, 0.9, 2.2),
        },
    ),
    Case(
        name="rms_norm",
        grid={
            "mu": (-3.3, -1.0, 0.0, 0.316, 1.0),
            "sigma": DECADE,
            "r": THIRDS,
            "width": WIDTHS,
            **GRADIENT_GRID,
        },
        predict=predict_rms_norm,
        simulate=simulate_rms_norm,
        quantities=FORWARD + BACKWARD,
        note="With our terms of order 1/width; the authors' code has no RMSNorm.",
    ),
    Case(
        name="dropout",
        grid={
            "p": THIRDS,
            "mu": (-10.0, -1.0, 0.0, 1.0, 10.0),
            "sigma": DECADE,
            "r": THIRDS,
            **GRADIENT_GRID,
        },
        predict=predict_dropout,
        simulate=simulate_dropout,
        quantities=FORWARD + BACKWARD,
        note="The gradient passes the same mask.",
        published={
            "mean": (0.0, 0.1, 0.5),
            "variance": (0.1, 0.5, 1.5),
            "covariance": (0.0, 0.4, 1.3),
            "gradient_variance": (0.1, 0.7, 1.5),
            "gradient_covariance": (0.1, 0.5, 1.2),
        },
    ),
)
