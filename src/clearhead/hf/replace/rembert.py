"""RemBert: BERT with another order of norms or sizes, written without the interface."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.rembert.modeling_rembert import RemBertSelfAttention

from clearhead.hf.replace.bert_like import BertLike


class ClearheadRemBertSelfAttention(BertLike, RemBertSelfAttention):
    """`RemBertSelfAttention` with the patched attention."""

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Tensor | None = None,
        past_key_values: Any = None, output_attentions: bool | None = False, **kwargs: Any,
    ) -> Any:  # fmt: skip
        """See `RemBertSelfAttention`."""
        return self.attention(hidden_states, attention_mask, encoder_hidden_states, past_key_values, output_attentions)


CLASSES: dict[str, type[nn.Module]] = {"RemBertSelfAttention": ClearheadRemBertSelfAttention}
