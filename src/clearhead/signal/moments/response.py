"""What a pointwise function does to a Gaussian pair (x, y) of two tokens: one value for all that follows from it."""

from __future__ import annotations

from dataclasses import dataclass

from clearhead.signal.moments.types import GradientMoments, Moments


@dataclass(frozen=True)
class Response:
    """Moments of f(x), f(y) and of the slopes f'(x), f'(y), for x and y Gaussian with the moments given."""

    mean: float
    """E f(x)."""
    variance: float
    """Var f(x)."""
    covariance: float
    """Cov(f(x), f(y)), centred."""
    slope_square: float
    """E f'(x)^2."""
    slope_product: float
    """E f'(x) f'(y), raw: slopes multiply gradients of mean 0."""

    @property
    def output(self) -> Moments:
        """The moments of f(x)."""
        return Moments(self.mean, self.variance, self.covariance)

    def backward(self, g: GradientMoments) -> GradientMoments:
        """Return the gradient by x, from one by f(x) that does not depend on x."""
        return GradientMoments(g.variance * self.slope_square, g.covariance * self.slope_product)
