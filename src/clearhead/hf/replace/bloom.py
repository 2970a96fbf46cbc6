"""Bloom: ALiBi. The bias is our `ALiBi`, minus slope times distance, which no query row of N x M numbers is made for.

Bloom adds slope times the key's position, the same up to a constant for each query, which softmax does not see and
Self-Adjust does: there the paper's form is meant.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.models.bloom.modeling_bloom import BloomAttention

from clearhead.attention.bias import ALiBi
from clearhead.hf.replace.base import Interface, weights_if


class ClearheadBloomAttention(Interface, BloomAttention):
    """`BloomAttention` with the patched attention."""

    is_causal = True

    def forward(
        self, hidden_states: Tensor, residual: Tensor, alibi: Tensor, attention_mask: Any, layer_past: Any = None,
        use_cache: bool = False, output_attentions: bool = False, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `BloomAttention`."""
        q, k, v = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        bias = ALiBi(ALiBi.default_slopes(self.num_heads, q.device).to(q.dtype))
        asked = weights_if(output_attentions)
        out_bnhd, weights = self.interface(
            q, k, v, attention_mask,
            scaling=self.inv_norm_factor, dropout=self.attention_dropout.p, position_bias=bias, **asked,
        )  # fmt: skip
        out = self.dense(out_bnhd.flatten(2))
        return residual + F.dropout(out, p=self.hidden_dropout, training=self.training), weights


CLASSES: dict[str, type[nn.Module]] = {"BloomAttention": ClearheadBloomAttention}
