"""XGLM: a decoder of BART's kind with fixed positions, written without the interface."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.xglm.modeling_xglm import XGLMAttention

from clearhead.hf.replace.base import Interface, heads, past_of, remember, weights_if


class ClearheadXGLMAttention(Interface, XGLMAttention):
    """`XGLMAttention` with the patched attention."""

    @property
    def is_causal(self) -> bool:
        """Of the self attention; a cross attention says otherwise at its call."""
        return bool(self.is_decoder)

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, key_value_states: Tensor | None = None, past_key_values: Any = None,
        attention_mask: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `XGLMAttention`."""
        cross = key_value_states is not None
        part, ready = past_of(self, past_key_values, cross)
        q = heads(self.q_proj(hidden_states), self.head_dim)
        if ready:
            kept = part.layers[self.layer_idx]
            k, v = kept.keys, kept.values
        else:
            read = hidden_states if key_value_states is None else key_value_states
            k, v = heads(self.k_proj(read), self.head_dim), heads(self.v_proj(read), self.head_dim)
            k, v = remember(self, past_key_values, part, k, v, cross)
        keywords: dict[str, Any] = weights_if(kwargs.get("output_attentions"))
        if cross:
            keywords["is_causal"] = False
        out_bnhd, weights = self.interface(
            q, k, v, attention_mask, scaling=self.scaling, dropout=self.dropout or 0.0, **keywords
        )
        return self.out_proj(out_bnhd.flatten(2)), weights


CLASSES: dict[str, type[nn.Module]] = {"XGLMAttention": ClearheadXGLMAttention}
