"""Kerple's positions as a bias by blocks (Chi et al., arXiv 2205.09921): kernels of the distance, learned per head.

    log:    bias[h, q, k] = -r1[h] * log(1 + r2[h] |q - k|)
    power:  bias[h, q, k] = -r1[h] * |q - k|^r2[h]

r1, r2 > 0, and r2 <= 2 in the power form: then the kernel is conditionally positive definite, and becomes positive
definite by a constant that a softmax forgets (other weights do not: self_adjust sees it). ALiBi is the power form with
r2 = 1 and fixed r1. Whoever makes the bias keeps r1 and r2 in range; see `layers/position/kerple.py`.

Shapes: b batch, h query heads, l diagonals of a block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clearhead.attention.bias import BIASES
from clearhead.attention.distance import DistanceBias
from clearhead.errors import unknown

FORMS = ("log", "power")


@dataclass(frozen=True, eq=False)
class KerpleBias(DistanceBias):
    """See the top of this file. `scale` r1 and `rate` r2 are [h]."""

    scale: Tensor
    rate: Tensor
    form: str = "log"
    code = "kerple"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise unknown("KerpleBias form", self.form, FORMS)
        if self.scale.dim() != 1 or self.scale.shape != self.rate.shape:
            raise ValueError(
                f"KerpleBias: expected scale and rate [heads], got shapes {tuple(self.scale.shape)} and "
                f"{tuple(self.rate.shape)}"
            )

    def tensors(self) -> list[Tensor]:
        """See `Bias.tensors`."""
        return [self.scale, self.rate]

    def numbers(self) -> tuple[int, ...]:
        """See `Bias.numbers`."""
        return (FORMS.index(self.form),)

    @classmethod
    def decode(cls, tensors: list[Tensor], *numbers: int) -> KerpleBias:
        """See `Bias.decode`."""
        return cls(tensors[0], tensors[1], FORMS[numbers[0]])

    @staticmethod
    def narrow(tensors: list[Tensor], batch: slice, heads: slice) -> list[Tensor]:
        """See `Bias.narrow`."""
        return [t[heads] for t in tensors]

    def values(self, distance: Tensor) -> Tensor:
        """See `DistanceBias.values`."""
        return -self._each_head(self.scale, distance) * self._kernel(distance)

    def add_gradient(self, gradients: list[Tensor], distance_bl: Tensor, sums_bhl: Tensor) -> None:
        """d r1 = -sum g kernel; d r2 = -r1 sum g |d| / (1 + r2 |d|), or -r1 sum g |d|^r2 log |d| (0 at d = 0)."""
        sums_hbl, kernel_hbl = sums_bhl.transpose(0, 1), self._kernel(distance_bl)
        far_bl = distance_bl.abs().to(self.rate.dtype)
        if self.form == "log":
            slope_hbl = far_bl / (1.0 + self._each_head(self.rate, distance_bl) * far_bl)
        else:
            slope_hbl = kernel_hbl * far_bl.clamp_min(1.0).log()
        gradients[0] -= (sums_hbl * kernel_hbl).sum(dim=(1, 2))
        gradients[1] -= self.scale * (sums_hbl * slope_hbl).sum(dim=(1, 2))

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Bias.check`."""
        if self.scale.shape != (h,):
            raise ValueError(
                f"KerpleBias: expected a scale and a rate for each of {h} heads, got shape {tuple(self.scale.shape)}"
            )

    def _kernel(self, distance: Tensor) -> Tensor:
        far, rate = distance.abs().to(self.rate.dtype), self._each_head(self.rate, distance)
        return torch.log1p(rate * far) if self.form == "log" else far.pow(rate)

    @staticmethod
    def _each_head(t: Tensor, distance: Tensor) -> Tensor:
        return t.view(-1, *(1 for _ in distance.shape))


BIASES[KerpleBias.code] = KerpleBias
