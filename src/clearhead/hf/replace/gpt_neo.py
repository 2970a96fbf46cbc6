"""GPT-Neo: unscaled scores, every other layer a window; the scores are `_attn`, which is all that is replaced."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

from clearhead.hf.replace.base import KeepsForward, within_window


class ClearheadGPTNeoSelfAttention(KeepsForward, GPTNeoSelfAttention):
    """`GPTNeoSelfAttention` with the patched attention; its local layers see `config.window_size` keys."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        window = {}
        if self.attention_type == "local":
            size = self.config.window_size
            attention_mask = within_window(attention_mask, query.shape[-2], key.shape[-2], size)
            window = {"sliding_window": size}
        out_bnhd, weights = self.interface(
            query.to(value.dtype), key.to(value.dtype), value, attention_mask,
            scaling=1.0, dropout=self.attn_dropout.p, **window,
        )  # fmt: skip
        return out_bnhd.transpose(1, 2), weights


CLASSES: dict[str, type[nn.Module]] = {
    "GPTNeoSelfAttention": ClearheadGPTNeoSelfAttention,
    "GPTNeoFlashAttention2": ClearheadGPTNeoSelfAttention,
}
