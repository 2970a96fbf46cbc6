"""GPT-J: rotary positions and a cache of its own; the scores are `_attn`, which is all that is replaced."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.gptj.modeling_gptj import GPTJAttention

from clearhead.hf.replace.base import KeepsForward


class ClearheadGPTJAttention(KeepsForward, GPTJAttention):
    """`GPTJAttention` with the patched attention."""

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        # Rotary positions may have raised queries and keys to float32; scores are made in float32 by themselves.
        out_bnhd, weights = self.interface(
            query.to(value.dtype), key.to(value.dtype), value, attention_mask,
            scaling=1.0 / float(self.scale_attn), dropout=self.attn_dropout.p,
        )  # fmt: skip
        return out_bnhd.transpose(1, 2), weights


CLASSES: dict[str, type[nn.Module]] = {
    "GPTJAttention": ClearheadGPTJAttention,
    "GPTJFlashAttention2": ClearheadGPTJAttention,
}
