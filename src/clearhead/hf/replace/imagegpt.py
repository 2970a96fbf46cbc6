"""ImageGPT: GPT-2 as it was before the interface; both of its ways to scores are replaced."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.imagegpt.modeling_imagegpt import ImageGPTAttention
from transformers.utils import torch_float

from clearhead.hf.replace.base import KeepsForward, causal_too


class ClearheadImageGPTAttention(KeepsForward, ImageGPTAttention):
    """`ImageGPTAttention` with the patched attention."""

    @property
    def is_causal(self) -> bool:
        """A cross attention is not."""
        return not self.is_cross_attention

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        # The model's masks are of keys alone; causality is the attention's.
        if not self.is_cross_attention:
            attention_mask = causal_too(attention_mask, query.shape[-2], key.shape[-2])
        # The library's own cast: in 5.17 it cuts the root down to a whole number, and so does the model's attention.
        scaling = 1.0 / float(torch_float(value.shape[-1] ** 0.5)) if self.scale_attn_weights else 1.0
        if self.scale_attn_by_inverse_layer_idx:
            scaling /= float((self.layer_idx or 0) + 1)
        out_bnhd, weights = self.interface(
            query, key, value, attention_mask, scaling=scaling, dropout=self.attn_dropout.p
        )
        return out_bnhd.transpose(1, 2), weights

    _upcast_and_reordered_attn = _attn


CLASSES: dict[str, type[nn.Module]] = {"ImageGPTAttention": ClearheadImageGPTAttention}
