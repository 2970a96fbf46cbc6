"""Fixed sine and cosine positions, added to the embedding.

Shapes: positions [1|b, t] int64 -> [1|b, t, width].
"""

from __future__ import annotations

import math

import torch
import torch.nn as nn
from torch import Tensor


def sinusoid(positions: Tensor, width: int, *, base: float = 10000.0) -> Tensor:
    """[sin(p w_0..) | cos(p w_0..)], w_i = base^(-2i/width), in fp32 (arXiv 1706.03762, section 3.5).

    We place sines in the first half and cosines in the second, where the paper interleaves them: the same up to a
    permutation of components.
    """
    half = width // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / half
    angle = positions[..., None].float() * torch.exp(exponent * -math.log(base))
    return torch.cat((angle.sin(), angle.cos()), dim=-1)


class SinusoidalPosition(nn.Module):
    """amplitude * sinusoid(p). No parameters, no largest position.

    Differs from the paper in scale: it multiplies embeddings by sqrt(width) and leaves the sinusoid at root mean square
    0.71. Here embeddings start at std 0.02 and are not multiplied, so the sinusoid is brought to the same 0.02.
    """

    def __init__(self, width: int, *, rms: float = 0.02) -> None:
        super().__init__()
        self.width = width
        self.amplitude = rms * math.sqrt(2.0)

    def forward(self, positions: Tensor) -> Tensor:
        """See the class."""
        return self.amplitude * sinusoid(positions, self.width)
