"""Random inputs and empirical moments for the simulations.

Shapes: b independent sequences, t tokens, w features.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor


def equicorrelated(
    size: tuple[int, int, int], mean: float, variance: float, correlation: float, generator: Generator
) -> Tensor:
    """Return Gaussian x_btw: features independent, any two tokens of a sequence with the same correlation (>= 0)."""
    if not 0.0 <= correlation <= 1.0:
        raise ValueError(f"expected a correlation in [0, 1], got {correlation}")
    batch, tokens, width = size
    own_btw = torch.randn(batch, tokens, width, generator=generator)
    common_b1w = torch.randn(batch, 1, width, generator=generator)
    mixed_btw = own_btw.mul_(math.sqrt(1.0 - correlation)).add_(common_b1w.mul_(math.sqrt(correlation)))
    return mixed_btw.mul_(math.sqrt(variance)).add_(mean)


def moments_of(x_btw: Tensor, prefix: str = "") -> dict[str, float]:
    """Return mean, variance and token covariance, about the one grand mean, averaged over sequences and features."""
    mean = float(x_btw.double().mean())
    return {f"{prefix}mean": mean, **second_moments_of(x_btw - mean, prefix)}


def second_moments_of(x_btw: Tensor, prefix: str = "") -> dict[str, float]:
    """Return the variance and token covariance about 0: of a gradient, say."""
    tokens = x_btw.shape[1]
    square = float(x_btw.square().sum(1).double().mean())
    square_of_sum = float(x_btw.sum(1).square().double().mean())
    return {
        f"{prefix}variance": square / tokens,
        f"{prefix}covariance": (square_of_sum - square) / (tokens * (tokens - 1)),
    }


def gradient_by(x_btw: Tensor, output: Tensor, gradient: Tensor) -> Tensor:
    """Return the gradient of <output, gradient> by x, by autograd."""
    (found,) = torch.autograd.grad((output * gradient).sum(), x_btw)
    return found
