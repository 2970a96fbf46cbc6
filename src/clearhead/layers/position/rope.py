"""Rotary positions: turn pairs of query and key components by an angle that grows with the position.

Shapes: positions [1|b, t] int64; cos, sin fp32 [1|b, 1, t, head_dim/2]; x_bhtd [b, heads, t, head_dim].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """Cosine and sine of every angle, computed once per forward and shared by all layers."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def at(
        cls, positions: Tensor, head_dim: int, *, base: float = 10000.0, dtype: torch.dtype = torch.float32
    ) -> Rotation:
        """Angles p * base^(-2i/head_dim), i < head_dim/2 (arXiv 2104.09864, eq. 15), in fp32 or better.

        The frequencies are made here and not kept in a buffer, so `model.to(bfloat16)` cannot round them: at position
        1000 a bf16 angle is off by several radians.
        """
        half = head_dim // 2
        exponent = torch.arange(half, device=positions.device, dtype=dtype) / half
        angle = positions[:, None, :, None].to(dtype) * torch.pow(base, -exponent)
        return cls(angle.cos(), angle.sin())

    def __call__(self, x_bhtd: Tensor) -> Tensor:
        """Rotate component i with component i + head_dim/2, in fp32 or better; return the dtype of `x`.

        The paper pairs neighbours (2i, 2i+1); the halves are the same rotation after a fixed permutation of components.
        """
        wide = torch.promote_types(x_bhtd.dtype, torch.float32)
        first, second = x_bhtd.to(wide).chunk(2, dim=-1)
        turned = torch.cat((first * self.cos - second * self.sin, second * self.cos + first * self.sin), dim=-1)
        return turned.to(x_bhtd.dtype)
