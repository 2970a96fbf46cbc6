"""CodeGen: GPT-J with a fused projection; the scores are `_attn`, which is all that is replaced."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.codegen.modeling_codegen import CodeGenAttention

from clearhead.hf.replace.base import KeepsForward


class ClearheadCodeGenAttention(KeepsForward, CodeGenAttention):
    """`CodeGenAttention` with the patched attention."""

    is_causal = True

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        out_bnhd, weights = self.interface(
            query.to(value.dtype), key.to(value.dtype), value, attention_mask,
            scaling=1.0 / float(self.scale_attn), dropout=self.attn_dropout.p,
        )  # fmt: skip
        return out_bnhd.transpose(1, 2), weights


CLASSES: dict[str, type[nn.Module]] = {"CodeGenAttention": ClearheadCodeGenAttention}
