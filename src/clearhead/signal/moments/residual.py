"""The residual sum, and scales. Skip and branch are uncorrelated: the branch ends in a fresh matrix of mean 0."""

from __future__ import annotations

from clearhead.signal.moments.types import GradientMoments, Moments


def scaled(x: Moments, factor: float) -> Moments:
    """Return the moments of factor * x."""
    return Moments(factor * x.mean, factor**2 * x.variance, factor**2 * x.covariance)


def residual(stream: Moments, branch: Moments, stream_scale: float = 1.0, branch_scale: float = 1.0) -> Moments:
    """Return the moments of stream_scale * stream + branch_scale * branch: means, variances and covariances add.

    Derived by us. The scale of a vector is its root mean square. Approximate once training has
    correlated the branch with the stream.
    """
    kept, added = scaled(stream, stream_scale), scaled(branch, branch_scale)
    return Moments(kept.mean + added.mean, kept.variance + added.variance, kept.covariance + added.covariance)


def residual_backward(
    g: GradientMoments, stream_scale: float = 1.0, branch_scale: float = 1.0
) -> tuple[GradientMoments, GradientMoments]:
    """Return the gradients by the stream (the direct path alone) and by the branch's output.

    The gradient that leaves below is the direct path plus what the branch's own backward makes of the second (`+` of
    `GradientMoments`): the two are uncorrelated over the branch's weights.
    """
    return g.scaled(stream_scale**2), g.scaled(branch_scale**2)
