"""The linear map y = x W^T + b: forward, backward, and the gradient of its weight.

Expectations are over inputs and weights. For one draw of W the part that all tokens share keeps a relative fluctuation
of order 1 / sqrt(fan_out).
"""

from __future__ import annotations

from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import Matrix


def linear(x: Moments, matrix: Matrix) -> Moments:
    """Return the moments of y = x W^T + b.

        mean = 0      variance = n v (variance_x + mean_x^2) + b      covariance = n v (covariance_x + mean_x^2) + b

    n = fan_in, v and b the mean squares of the entries of W and of the bias, both of mean 0. The map
    sees the *raw* moments of its input: what all tokens share, a mean included, comes out as token covariance. The
    bias is such a share too (derived by us; DeepScaleLM has no biases).
    """
    gain = matrix.fan_in * matrix.variance
    return Moments(0.0, gain * x.second_moment + matrix.bias_variance, gain * x.raw_covariance + matrix.bias_variance)


def linear_backward(g: GradientMoments, matrix: Matrix) -> GradientMoments:
    """Return the gradient by the input: variance and covariance times fan_out v.

    `g` must not depend on W. At initialisation this holds up to order 1 / width: above the map, W is seen only through
    its outputs. It ends where the weight is used twice (a tied output head reads the table that made the input), and in
    training.
    """
    return g.scaled(matrix.fan_out * matrix.variance)


def weight_gradient(g: GradientMoments, x: Moments, matrix: Matrix, tokens: int) -> float:
    """Return E ||dL/dW||_F^2 of one sequence, where dL/dW = sum_t g_t x_t^T.

        fan_in fan_out [ T variance_g second_moment_x + T (T - 1) covariance_g raw_covariance_x ]

    `g` is the gradient at the output, `x` the input, T = `tokens`. Derived by us; needs g independent of x. A loss that
    is a mean over B sequences of uncorrelated gradients has 1/B of this.
    """
    if tokens < 1:
        raise ValueError(f"expected at least one token, got {tokens}")
    own = g.variance * x.second_moment
    shared = g.covariance * x.raw_covariance
    return matrix.fan_in * matrix.fan_out * (tokens * own + tokens * (tokens - 1) * shared)
