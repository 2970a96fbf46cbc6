"""Pointwise activations by name, forward and backward.

ReLU is closed for any mean, GELU for a mean of 0 (what a linear map hands on); everything else is a quadrature.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from scipy import special

from clearhead.errors import unknown
from clearhead.signal.moments.domain import checked
from clearhead.signal.moments.gelu import centred_gelu_response
from clearhead.signal.moments.quadrature import Array, Function, smooth_response
from clearhead.signal.moments.relu import relu_response
from clearhead.signal.moments.response import Response
from clearhead.signal.moments.types import GradientMoments, Moments

_ROOT_2_OVER_PI = math.sqrt(2.0 / math.pi)
_CUBIC = 0.044715
_QUICK = 1.702


def activation(name: str, x: Moments) -> Moments:
    """Return the moments of f(x), x Gaussian with the given moments; see `activation_response`."""
    return activation_response(name, x).output


def activation_backward(name: str, g: GradientMoments, x: Moments) -> GradientMoments:
    """Return the gradient by x from `g`, the gradient by f(x).

        variance = variance_g E f'(x)^2        covariance = covariance_g E f'(x) f'(y)

    Exact when g does not depend on x, as behind a fresh linear map. A gradient that knows the sign of x (a loss on f(x)
    itself, a trained network) breaks it.
    """
    return activation_response(name, x).backward(g)


@lru_cache(maxsize=4096)
def activation_response(name: str, x: Moments) -> Response:
    """Return everything about f at x, for both directions.

    `name`: relu, gelu, gelu_tanh, silu, quick_gelu, tanh, sigmoid, softplus, relu2, identity, or a name that Hugging
    Face has for one of these. `clearhead.errors.UserError` for any other; `ValueError` for impossible moments.
    """
    known = ALIASES.get(name, name)
    if known == "relu":
        return relu_response(x)
    if known == "identity":
        mean, variance, r = checked(x)
        return Response(mean, variance, r * variance, 1.0, 1.0)
    if known == "gelu" and x.mean == 0.0:
        _, variance, r = checked(x)
        return centred_gelu_response(variance, r)
    if known not in SMOOTH:
        raise unknown("activation", name, ACTIVATIONS)
    return smooth_response(*SMOOTH[known], x)


def _density(x: Array) -> Array:
    return np.exp(-0.5 * np.square(x)) / math.sqrt(2.0 * math.pi)


def _gelu(x: Array) -> Array:
    """x Phi(x)."""
    return x * special.ndtr(x)


def _gelu_slope(x: Array) -> Array:
    return special.ndtr(x) + x * _density(x)


def _gelu_tanh(x: Array) -> Array:
    """x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2."""
    return 0.5 * x * (1.0 + np.tanh(_ROOT_2_OVER_PI * (x + _CUBIC * x**3)))


def _gelu_tanh_slope(x: Array) -> Array:
    bent = np.tanh(_ROOT_2_OVER_PI * (x + _CUBIC * x**3))
    inner = _ROOT_2_OVER_PI * (1.0 + 3.0 * _CUBIC * np.square(x))
    return 0.5 * (1.0 + bent) + 0.5 * x * (1.0 - np.square(bent)) * inner


def _silu(x: Array) -> Array:
    """x sigmoid(x)."""
    return x * special.expit(x)


def _silu_slope(x: Array) -> Array:
    share = special.expit(x)
    return share * (1.0 + x * (1.0 - share))


def _quick_gelu(x: Array) -> Array:
    return x * special.expit(_QUICK * x)


def _quick_gelu_slope(x: Array) -> Array:
    share = special.expit(_QUICK * x)
    return share * (1.0 + _QUICK * x * (1.0 - share))


def _tanh_slope(x: Array) -> Array:
    return 1.0 - np.square(np.tanh(x))


def _sigmoid_slope(x: Array) -> Array:
    share = special.expit(x)
    return share * (1.0 - share)


def _softplus(x: Array) -> Array:
    return np.logaddexp(0.0, x)


def _relu2(x: Array) -> Array:
    return np.square(np.maximum(x, 0.0))


def _relu2_slope(x: Array) -> Array:
    return 2.0 * np.maximum(x, 0.0)


SMOOTH: dict[str, tuple[Function, Function]] = {
    "gelu": (_gelu, _gelu_slope),
    "gelu_tanh": (_gelu_tanh, _gelu_tanh_slope),
    "silu": (_silu, _silu_slope),
    "quick_gelu": (_quick_gelu, _quick_gelu_slope),
    "tanh": (np.tanh, _tanh_slope),
    "sigmoid": (special.expit, _sigmoid_slope),
    "softplus": (_softplus, special.expit),
    "relu2": (_relu2, _relu2_slope),
}
"""Function and derivative, for the quadrature."""

ALIASES = {
    "swish": "silu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "linear": "identity",
}
"""Other names of the same functions."""

ACTIVATIONS = ("relu", "identity", *SMOOTH, *ALIASES)
"""Every name that is understood."""
