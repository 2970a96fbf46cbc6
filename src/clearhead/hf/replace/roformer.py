"""RoFormer: BERT with rotary positions, on values too where its config says so."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.roformer.modeling_roformer import RoFormerSelfAttention

from clearhead.hf.replace.bert_like import BertLike


class ClearheadRoFormerSelfAttention(BertLike, RoFormerSelfAttention):
    """`RoFormerSelfAttention` with the patched attention."""

    def rotate(self, q: Tensor, k: Tensor, v: Tensor, positions: Any) -> tuple[Tensor, Tensor, Tensor]:
        """See `BertLike`."""
        if positions is None:
            return q, k, v
        if self.rotary_value:
            return tuple(self.apply_rotary_position_embeddings(positions, q, k, v))
        q, k = self.apply_rotary_position_embeddings(positions, q, k)
        return q, k, v

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, sinusoidal_pos: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None, past_key_values: Any = None, output_attentions: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `RoFormerSelfAttention`."""
        return self.attention(
            hidden_states, attention_mask, encoder_hidden_states, past_key_values, output_attentions, sinusoidal_pos
        )


CLASSES: dict[str, type[nn.Module]] = {"RoFormerSelfAttention": ClearheadRoFormerSelfAttention}
