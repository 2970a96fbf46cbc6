"""What the cases share: names, ranges, and inputs as moments and as samples.

Shapes: b sequences, t tokens, w features.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Generator, Tensor

from clearhead.signal.moments.types import GradientMoments, Moments
from experiments.moment_formulas.case import Params
from experiments.moment_formulas.draw import equicorrelated, gradient_by, moments_of, second_moments_of

FORWARD = ("mean", "variance", "covariance")
BACKWARD = ("gradient_variance", "gradient_covariance")

CORRELATIONS = (0.0, 0.2, 0.4, 0.6, 0.8)
THIRDS = (0.0, 1 / 3, 2 / 3)
DEVIATIONS = (0.1, 0.316, 1.0, 3.16, 10.0)
DECADE = (0.316, 1.0, 3.16)
WIDTHS = (100, 316, 1000)
GRADIENT_GRID = {"sigma_g": DECADE, "r_g": THIRDS}

Published = Mapping[str, tuple[float, float, float]]

POINTS = 4
"""Tokens of a sequence where nothing depends on their number."""


def given(params: Params) -> tuple[Moments, GradientMoments]:
    """The input and the gradient from above that the parameters ask for."""
    x = Moments.of(params["sigma"] ** 2, params["r"], params.get("mu", 0.0))
    return x, GradientMoments.of(params["sigma_g"] ** 2, params["r_g"])


def drawn(params: Params, size: tuple[int, int, int], out: int | None, generator: Generator) -> tuple[Tensor, Tensor]:
    """The same as samples: x of `size`, requiring a gradient, and g with `out` features (None: those of x)."""
    x = equicorrelated(size, params.get("mu", 0.0), params["sigma"] ** 2, params["r"], generator)
    size_g = (*size[:2], size[2] if out is None else out)
    return x.requires_grad_(), equicorrelated(size_g, 0.0, params["sigma_g"] ** 2, params["r_g"], generator)


def as_quantities(y: Moments, g: GradientMoments) -> dict[str, float]:
    """Predictions under the names of the table."""
    return {
        "mean": y.mean,
        "variance": y.variance,
        "covariance": y.covariance,
        "gradient_variance": g.variance,
        "gradient_covariance": g.covariance,
    }


def measured(x: Tensor, y: Tensor, g: Tensor) -> dict[str, float]:
    """The moments of y, and of the gradient of <y, g> by x."""
    return {**moments_of(y.detach()), **second_moments_of(gradient_by(x, y, g), "gradient_")}
