"""MPT: ALiBi, whose slopes are read off the bias that the model makes; clipped projections.

MPT counts distances from the last key of a call, the same up to a constant for each query; our `ALiBi` counts them from
the query, so that decoding through the cache gives what the full forward gives under any weights.
"""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.mpt.modeling_mpt import MptAttention

from clearhead.attention.bias import ALiBi
from clearhead.hf.replace.base import Interface, heads


class ClearheadMptAttention(Interface, MptAttention):
    """`MptAttention` with the patched attention."""

    is_causal = True

    def forward(
        self, hidden_states: Tensor, position_bias: Tensor | None, past_key_values: Any = None,
        attention_mask: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `MptAttention`; `position_bias` is [h, 1, longest]."""
        mixed = self.Wqkv(hidden_states)
        if self.clip_qkv:
            mixed = mixed.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        q, k, v = (heads(part, self.head_dim) for part in mixed.chunk(3, dim=2))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        keywords: dict[str, Any] = {"scaling": self.softmax_scale, "dropout": self.attn_dropout_p}
        if position_bias is not None:
            slopes = position_bias[:, 0, -1] - position_bias[:, 0, -2]
            keywords["position_bias"] = ALiBi(slopes.to(q.dtype))
        out_bnhd, weights = self.interface(q, k, v, attention_mask, **keywords)
        return self.out_proj(out_bnhd.flatten(2)), weights


CLASSES: dict[str, type[nn.Module]] = {"MptAttention": ClearheadMptAttention}
