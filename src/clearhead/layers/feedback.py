"""Layers of the Feedback Transformer: a block whose attention looks at memories, and how a memory is made.

Legend: b batch, w width, n memories, L layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.layers.attention import Attention, Source
from clearhead.layers.block import Block
from clearhead.layers.geometry import Geometry
from clearhead.layers.temperature import SelectiveTemperatures


class MemoryMix(nn.Module):
    """m = sum_l softmax(weight)_l x^l over the embedding (l = 0) and the output of each of L layers (arXiv 2002.09402).

    One weight for each of the L + 1, starting at 0: the mean. The softmax is taken in fp32 or better, and so is the
    sum. `hold` fixes a choice for good ("pick one layer"), for ablations.
    """

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layers + 1))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"weight": 0.0}

    def shares(self) -> Tensor:
        """softmax(weight), [L + 1]."""
        return self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)).softmax(dim=0)

    @torch.no_grad()
    def hold(self, layer: int) -> None:
        """Make the memory the output of one layer (0 = the embedding), and learn no mixture."""
        if not 0 <= layer < len(self.weight):
            raise ValueError(f"MemoryMix.hold: expected a layer from 0 to {len(self.weight) - 1}, got {layer}")
        # 1e4 apart, the other shares are exactly 0 in every dtype.
        self.weight.fill_(-1e4)
        self.weight[layer] = 0.0
        self.weight.requires_grad_(False)

    def forward(self, states: Sequence[Tensor], shares: Tensor) -> Tensor:
        """Mix L + 1 states [b, 1, w] by `shares()`, which a pass asks for once."""
        stacked_b1wl = torch.stack(tuple(states), dim=-1)
        return (stacked_b1wl * shares).sum(dim=-1).to(stacked_b1wl.dtype)


class FeedbackAttention(Attention):
    """Attention whose keys and values are those of memories, made elsewhere by `read`."""

    def forward(self, x_b1w: Tensor, geometry: Geometry, source: Source) -> Tensor:  # type: ignore[override]
        """Let x [b, 1, w] look at `source`; the geometry is that of this one token."""
        return self.look(x_b1w, self.query(x_b1w), source, geometry)


class FeedbackBlock(Block):
    """x <- x + attention(x, memories); x <- x + feed_forward(x), each sum as its residual says."""

    def forward(self, x_b1w: Tensor, geometry: Geometry, source: Source) -> Tensor:  # type: ignore[override]
        """See the class; x [b, 1, w]."""
        x_b1w = self.attention_residual(x_b1w, lambda h_b1w: self.attention(h_b1w, geometry, source))
        return self.feed_forward_residual(x_b1w, self.feed_forward)


def share_sources(blocks: Iterable[nn.Module]) -> None:
    """Give all blocks the first one's key and value matrices, key norm, and temperatures of keys and values."""
    first, *rest = (block.attention for block in blocks)
    assert isinstance(first, Attention)
    for other in rest:
        assert isinstance(other, Attention)
        other.key, other.value, other.key_norm = first.key, first.value, first.key_norm
        if isinstance(first.temperatures, SelectiveTemperatures):
            assert isinstance(other.temperatures, SelectiveTemperatures)
            other.temperatures.key, other.temperatures.value = first.temperatures.key, first.temperatures.value
