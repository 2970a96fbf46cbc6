"""One transformer block: attention, then feed-forward, each on the residual stream."""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from clearhead.layers.attention import Attention
from clearhead.layers.feed_forward import FeedForward, SwiGLU
from clearhead.layers.geometry import Geometry
from clearhead.layers.residual import PostNormResidual, PreNormResidual
from clearhead.memory.cache import KVCache

Residual = PreNormResidual | PostNormResidual


class Block(nn.Module):
    """x <- x + attention(x); x <- x + feed_forward(x), each sum as its residual says (norm, scale, dropout).

    Shapes: [b, t, width] -> [b, t, width].
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: FeedForward | SwiGLU,
        attention_residual: Residual,
        feed_forward_residual: Residual,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_residual = attention_residual
        self.feed_forward_residual = feed_forward_residual

    def forward(self, x_btw: Tensor, geometry: Geometry, cache: KVCache | None = None) -> Tensor:
        """See the class."""
        x_btw = self.attention_residual(x_btw, lambda h_btw: self.attention(h_btw, geometry, cache))
        return self.feed_forward_residual(x_btw, self.feed_forward)
