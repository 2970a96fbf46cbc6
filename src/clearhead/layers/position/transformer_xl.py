"""Transformer-XL's relative positions (arXiv 1901.02860, section 3.3) as longer queries and keys.

    A_ij = (q_i + u) . k_j + (q_i + v) . W R_{i-j},     R_k = [sin(k w) | cos(k w)],  w_t = 10000^(-2t/p)

With W^T (q_i + v) = [a | b], one half for the sines and one for the cosines, the second term is

    sum_t a_t sin((i-j) w_t) + b_t cos((i-j) w_t)
    = [a sin iw + b cos iw | b sin iw - a cos iw] . [cos jw | sin jw]                  (sine and cosine of a difference)

an inner product of something of the query i with something of the key j. So attention gets queries and keys of
d + p components and no bias: every weighting, read, pattern, temperature and kernel of the algebra serves it, nothing
is shifted into place, and no entry beyond the diagonal exists that would have to be masked. A query temperature scales
both terms, a key temperature too: they scale whole scores.

The price is p more components in each score. The paper has p = the model's width; `xl_width` makes it smaller.
Differs from the released code: u and v are a layer's own (there all layers share them), so that a block stays whole
when models are sharded; they start at 0, a gradient flows from the first step.

Legend: b batch, t tokens, h query heads, g key/value heads, d head dim, p components of R.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.layers.position.rope import Rotation


class RelativeXL(nn.Module):
    """u, v and W of one attention layer; `rotation` holds cosine and sine of the positions, [1|b, 1, t, p/2]."""

    def __init__(self, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        if width < 2 or width % 2:
            raise ValueError(f"RelativeXL: sines are paired with cosines, expected an even width, got {width}")
        self.heads, self.head_dim, self.width = heads, head_dim, width
        self.distance = nn.Linear(width, heads * head_dim, bias=False)
        # Flat: parameters of one dimension are not decayed, as no bias is.
        self.content_bias = nn.Parameter(torch.zeros(heads * head_dim))
        self.distance_bias = nn.Parameter(torch.zeros(heads * head_dim))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"content_bias": 0.0, "distance_bias": 0.0}

    def query(self, q_bhtd: Tensor, rotation: Rotation) -> Tensor:
        """[b, h, t, d] -> [b, h, t, d + p]."""
        u_h1d, v_h1d = (
            bias.view(self.heads, 1, self.head_dim).to(q_bhtd.dtype) for bias in (self.content_bias, self.distance_bias)
        )
        weight_hdp = self.distance.weight.view(self.heads, self.head_dim, self.width)
        seen_bhtp = torch.matmul(q_bhtd + v_h1d, weight_hdp)
        a, b = seen_bhtp.to(torch.promote_types(seen_bhtp.dtype, torch.float32)).chunk(2, dim=-1)
        turned = (a * rotation.sin + b * rotation.cos, b * rotation.sin - a * rotation.cos)
        return torch.cat((q_bhtd + u_h1d, torch.cat(turned, dim=-1).to(q_bhtd.dtype)), dim=-1)

    def key(self, k_bgsd: Tensor, rotation: Rotation) -> Tensor:
        """[b, g, s, d] -> [b, g, s, d + p]."""
        place = torch.cat((rotation.cos, rotation.sin), dim=-1).to(k_bgsd.dtype)
        return torch.cat((k_bgsd, place.expand(*k_bgsd.shape[:3], -1)), dim=-1)
