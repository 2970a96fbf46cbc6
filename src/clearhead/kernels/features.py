"""Feature maps of a random-feature kernel: x to phi(x) = F e^c with F bounded, and the gradient back to x.

    K(x, y) is estimated by phi(x) . phi(y)

`softmax`, `hyperbolic`, `regularized`   phi(x) = r^-1/2 exp(w.x - |x|^2 / 2)   over the rows w (hyperbolic: w and -w)
`trigonometric`                          phi(x) = m^-1/2 exp(+|x|^2 / 2) [sin w.x, cos w.x]
`relu`                                   phi(x) = m^-1/2 (relu(w.x) + 1e-3)

(arXiv 2009.14794, eq. 5 and Lemma 1; the projections are drawn in `attention/performer.py`.) The log shift c is one
number for each x, its own: it never looks at another position, so nothing leaks. A constant factor of phi cancels in
attention but not in the kernel's own value, so it is kept in c.

Legend: t positions, d head dim, m projections, r features.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

RELU_FLOOR = 1e-3


class FeatureMap(ABC):
    """Made from the rows w: [m, d], or [g, m, d] for heads with rows of their own."""

    positive = True
    """Whether every feature is above 0, so that a log of the kernel exists."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    @property
    def width(self) -> int:
        """r, the number of features."""
        return self.rows.shape[-2]

    @abstractmethod
    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., t, d] to F [..., t, r], at most 1 in size where phi is unbounded, and c [..., t]."""

    @abstractmethod
    def gradient(self, x: Tensor, features: Tensor, d_features: Tensor) -> Tensor:
        """d x from F and d F. With phi = F e^c, d F = e^c d phi: c counts as a constant in d F, not in the answer."""

    def log(self, x: Tensor) -> Tensor:
        """log phi(x), [..., t, r], without underflow. Positive maps only."""
        features, shift = self(x)
        return features.log() + shift.unsqueeze(-1)


class Exponential(FeatureMap):
    """exp(w.x - |x|^2 / 2); d phi / d x = phi (w - x)."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureMap.__call__`."""
        u = x @ self.rows.mT
        top = u.amax(dim=-1, keepdim=True)
        shift = top.squeeze(-1) - 0.5 * x.square().sum(dim=-1) - 0.5 * math.log(self.width)
        return (u - top).exp_(), shift

    def gradient(self, x: Tensor, features: Tensor, d_features: Tensor) -> Tensor:
        """See `FeatureMap.gradient`."""
        t = d_features * features
        return t @ self.rows - t.sum(dim=-1, keepdim=True) * x

    def log(self, x: Tensor) -> Tensor:
        """See `FeatureMap.log`."""
        return x @ self.rows.mT - 0.5 * x.square().sum(dim=-1, keepdim=True) - 0.5 * math.log(self.width)


class Hyperbolic(Exponential):
    """The same over the rows w and -w, which is cosh in the product of two features."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(torch.cat([rows, -rows], dim=-2))


class Trigonometric(FeatureMap):
    """exp(+|x|^2 / 2) (sin w.x, cos w.x): unbiased, not positive; here for study."""

    positive = False

    @property
    def width(self) -> int:
        """Two features a projection."""
        return 2 * self.rows.shape[-2]

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureMap.__call__`."""
        u = x @ self.rows.mT
        shift = 0.5 * x.square().sum(dim=-1) - 0.5 * math.log(self.rows.shape[-2])
        return torch.cat([u.sin(), u.cos()], dim=-1), shift

    def gradient(self, x: Tensor, features: Tensor, d_features: Tensor) -> Tensor:
        """See `FeatureMap.gradient`."""
        sine, cosine = features.chunk(2, dim=-1)
        d_sine, d_cosine = d_features.chunk(2, dim=-1)
        through_u = (d_sine * cosine - d_cosine * sine) @ self.rows
        return through_u + (d_features * features).sum(dim=-1, keepdim=True) * x


class Relu(FeatureMap):
    """relu(w.x) + 1e-3: a kernel of its own, not an estimate of softmax's."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `FeatureMap.__call__`."""
        shift = torch.full_like(x[..., 0], -0.5 * math.log(self.width))
        return torch.relu(x @ self.rows.mT) + RELU_FLOOR, shift

    def gradient(self, x: Tensor, features: Tensor, d_features: Tensor) -> Tensor:
        """See `FeatureMap.gradient`."""
        return (d_features * (features > RELU_FLOOR)) @ self.rows


MAPS: dict[str, type[FeatureMap]] = {
    "softmax": Exponential,
    "hyperbolic": Hyperbolic,
    "regularized": Exponential,  # rows of norm sqrt(d) make the difference
    "trigonometric": Trigonometric,
    "relu": Relu,
}


def make_map(kernel: str, projection: Tensor, dtype: torch.dtype) -> FeatureMap:
    """The feature map of a kernel's name over rows in the working precision."""
    return MAPS[kernel](projection.to(dtype))
