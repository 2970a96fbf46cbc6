"""WavLM: a learned bias by relative position, gated by what stands at the query; used as the model makes it.

Only `torch_multi_head_self_attention` is replaced, which is handed to torch by the original.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.wavlm.modeling_wavlm import WavLMAttention

from clearhead.hf.replace.base import Interface, heads


class ClearheadWavLMAttention(Interface, WavLMAttention):
    """`WavLMAttention` with the patched attention."""

    is_causal = False

    def torch_multi_head_self_attention(
        self, hidden_states: Tensor, attention_mask: Tensor | None, gated_position_bias: Tensor
    ) -> Any:
        """`attention_mask` is [b, m], 1 where there is sound; the bias [b * h, n, m]."""
        q, k, v = (heads(project(hidden_states), self.head_dim) for project in (self.q_proj, self.k_proj, self.v_proj))
        seen = None if attention_mask is None else attention_mask.eq(1)[:, None, None, :]
        if seen is not None:
            seen = seen.expand(-1, -1, q.shape[2], -1)
        out_bnhd, weights = self.interface(
            q, k, v, seen, scaling=self.scaling, dropout=float(self.dropout),
            position_bias=gated_position_bias.unflatten(0, (-1, self.num_heads)),
        )  # fmt: skip
        return self.out_proj(out_bnhd.flatten(2)), weights


CLASSES: dict[str, type[nn.Module]] = {"WavLMAttention": ClearheadWavLMAttention}
