"""Falcon: rotary or ALiBi, grouped queries in three layouts.

The model's bias is used as it is, [b, h, 1, m]: its slopes are rounded to bfloat16, and trained so. It adds slope times
the key's position, up to a constant for each query the paper's; softmax does not see the constant, Self-Adjust does.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from clearhead.hf.replace.base import Interface, visible, weights_if


class ClearheadFalconAttention(Interface, FalconAttention):
    """`FalconAttention` with the patched attention."""

    def forward(
        self, hidden_states: Tensor, alibi: Tensor | None, attention_mask: Any, position_ids: Any = None,
        layer_past: Any = None, use_cache: bool = False, output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `FalconAttention`."""
        q, k, v = (part.transpose(1, 2) for part in self._apart(self.query_key_value(hidden_states)))
        keywords: dict[str, Any] = weights_if(output_attentions)
        if alibi is None:
            assert position_embeddings is not None
            q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        else:
            # The model has added its bias to the mask; apart again, they are the visibility of keys and one row a head.
            b, h = q.shape[:2]
            keywords["position_bias"] = alibi.view(b, h, 1, -1) * self.inv_norm_factor
            attention_mask = visible(attention_mask)
            attention_mask = attention_mask if attention_mask is None else attention_mask[:, :1]
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        # Rotary layers drop no weights, as the original does not; those with ALiBi do.
        out_bnhd, weights = self.interface(
            q, k, v, attention_mask, scaling=self.inv_norm_factor,
            dropout=0.0 if alibi is None else self.attention_dropout.p, **keywords,
        )  # fmt: skip
        return self.dense(out_bnhd.flatten(2)), weights

    def _apart(self, fused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, n, h, d], keys and values [b, n, g, d]: the original repeats grouped ones, here they stay g."""
        if not self.new_decoder_architecture:
            q, k, v = self._split_heads(fused)
            return q, k, v
        groups = fused.unflatten(-1, (self.num_kv_heads, -1, self.head_dim))
        return groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]


CLASSES: dict[str, type[nn.Module]] = {
    "FalconAttention": ClearheadFalconAttention,
    "FalconFlashAttention2": ClearheadFalconAttention,
}
