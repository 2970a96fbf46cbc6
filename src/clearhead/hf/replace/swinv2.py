"""Swin V2: cosine scores with a learned scale a head, and a bias from a small network of relative coordinates.

The scale goes into the queries and the scores are left unscaled; which patches of a shifted window see each other, the
original's -200 on the scores, is visibility.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers.models.swinv2.modeling_swinv2 import Swinv2SelfAttention

from clearhead.hf.replace.base import Interface, heads, weights_if


class ClearheadSwinv2SelfAttention(Interface, Swinv2SelfAttention):
    """`Swinv2SelfAttention` with the patched attention. The batch is that of windows."""

    is_causal = False

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, output_attentions: bool | None = False
    ) -> Any:
        """See `Swinv2SelfAttention`; `attention_mask` is [windows of an image, n, n], 0 or -100."""
        dim = self.attention_head_size
        q, k, v = (heads(project(hidden_states), dim) for project in (self.query, self.key, self.value))
        sharp = torch.clamp(self.logit_scale, max=math.log(100.0)).exp()
        q, k = F.normalize(q, dim=-1) * sharp, F.normalize(k, dim=-1)
        seen = None
        if attention_mask is not None:
            seen = (attention_mask == 0).repeat(q.shape[0] // attention_mask.shape[0], 1, 1).unsqueeze(1)
        keywords = weights_if(output_attentions)
        out_bnhd, weights = self.interface(
            q, k, v, seen, scaling=1.0, dropout=self.dropout.p, position_bias=self._bias(), **keywords
        )
        out = out_bnhd.flatten(2)
        return (out,) if weights is None else (out, weights)

    def _bias(self) -> Tensor:
        """[1, h, n, n], between 0 and 16."""
        high, wide = self.window_size
        n = high * wide
        by_offset = self.continuous_position_bias_mlp(self.relative_coords_table).view(-1, self.num_attention_heads)
        values = by_offset[self.relative_position_index.view(-1)].view(n, n, -1)
        return 16 * torch.sigmoid(values.permute(2, 0, 1)).unsqueeze(0)


CLASSES: dict[str, type[nn.Module]] = {"Swinv2SelfAttention": ClearheadSwinv2SelfAttention}
