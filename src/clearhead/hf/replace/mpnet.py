"""MPNet: BERT with T5's kind of bias, learned by relative position and shared by all layers."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from clearhead.hf.replace.base import Interface, heads, weights_if


class ClearheadMPNetSelfAttention(Interface, MPNetSelfAttention):
    """`MPNetSelfAttention` with the patched attention."""

    is_causal = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_bias: Tensor | None = None,
        output_attentions: bool = False, **kwargs: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        """See `MPNetSelfAttention`."""
        dim = self.attention_head_size
        q, k, v = (heads(project(hidden_states), dim) for project in (self.q, self.k, self.v))
        keywords: dict[str, Any] = weights_if(output_attentions)
        out_bnhd, weights = self.interface(
            q, k, v, attention_mask, scaling=float(dim) ** -0.5, dropout=self.dropout.p, position_bias=position_bias,
            **keywords,
        )  # fmt: skip
        out = self.o(out_bnhd.flatten(2))
        return (out,) if weights is None else (out, weights)


CLASSES: dict[str, type[nn.Module]] = {"MPNetSelfAttention": ClearheadMPNetSelfAttention}
