"""OpenAI's first GPT: post-norm, no cache; the scores are `_attn`, which is all that is replaced.

Its model makes a float mask of keys by hand, [b, 1, 1, m]; causality is the attention's own.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor
from transformers.models.openai.modeling_openai import Attention

from clearhead.hf.replace.base import Interface, visible, weights_if


class ClearheadOpenAIGPTAttention(Interface, Attention):
    """`Attention` of `modeling_openai` with the patched attention. `k` comes transposed, [b, h, d, m]."""

    is_causal = True

    def _attn(
        self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor | None = None, output_attentions: bool = False
    ) -> list[Tensor]:
        seen = visible(attention_mask)
        if seen is not None:
            n, m = q.shape[-2], k.shape[-1]
            seen = seen & torch.ones(n, m, dtype=torch.bool, device=q.device).tril(m - n)
        asked = weights_if(output_attentions)
        out_bnhd, weights = self.interface(
            q, k.transpose(-1, -2), v, seen,
            scaling=float(v.shape[-1]) ** -0.5 if self.scale else 1.0, dropout=self.attn_dropout.p, **asked,
        )  # fmt: skip
        out = out_bnhd.transpose(1, 2)
        return [out] if weights is None else [out, weights]


CLASSES: dict[str, type[nn.Module]] = {"Attention": ClearheadOpenAIGPTAttention}
