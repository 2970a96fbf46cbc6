"""One transformer block: attention, cross attention where there is a source, feed-forward, each on the residual stream.

Legend: b batch, t tokens, s tokens of the source, w width.
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import State
from clearhead.layers.attention import Attention
from clearhead.layers.cross_attention import Cross, CrossAttention
from clearhead.layers.feed_forward import FeedForward, SwiGLU
from clearhead.layers.geometry import Geometry
from clearhead.layers.residual import PostNormResidual, PreNormResidual

Residual = PreNormResidual | PostNormResidual


class Block(nn.Module):
    """x <- x + attention(x); [x <- x + cross_attention(x, source)]; x <- x + feed_forward(x), each sum as its residual
    says (norm, scale, dropout).

    Shapes: [b, t, width] -> [b, t, width].
    """

    def __init__(
        self,
        attention: Attention,
        feed_forward: FeedForward | SwiGLU,
        attention_residual: Residual,
        feed_forward_residual: Residual,
        cross_attention: CrossAttention | None = None,
        cross_attention_residual: Residual | None = None,
    ) -> None:
        super().__init__()
        if (cross_attention is None) != (cross_attention_residual is None):
            raise ValueError("Block: cross_attention and cross_attention_residual come together")
        self.attention = attention
        self.cross_attention = cross_attention
        self.feed_forward = feed_forward
        self.attention_residual = attention_residual
        self.cross_attention_residual = cross_attention_residual
        self.feed_forward_residual = feed_forward_residual

    def forward(
        self,
        x_btw: Tensor,
        geometry: Geometry,
        cache: State | None = None,
        states_bsw: Tensor | None = None,
        cross: Cross | None = None,
        past_bmw: Tensor | None = None,
    ) -> Tensor:
        """See the class. `states_bsw` and `cross` are the source of the cross attention, if the block has one.

        past_bmw: earlier inputs of this block, [b, m, w], that attention looks back on (memory), normed as x is.
        """
        if past_bmw is not None:
            past_bmw = self.attention_residual.reads(past_bmw)
        x_btw = self.attention_residual(x_btw, lambda h_btw: self.attention(h_btw, geometry, cache, past_bmw))
        if self.cross_attention is not None and self.cross_attention_residual is not None:
            if cross is None:
                raise ValueError("Block: this block has cross attention and needs a source")
            look = self.cross_attention
            x_btw = self.cross_attention_residual(x_btw, lambda h_btw: look(h_btw, states_bsw, cross))
        return self.feed_forward_residual(x_btw, self.feed_forward)
