"""timm's block and its attention, written again in a few lines: what calls our class when timm is not there.

Only what a vision transformer of timm 1.0 does with `attn_layer`: the keywords it builds with, and the call.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F


class Attention(nn.Module):
    """The reference: softmax, `scaled_dot_product_attention`."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, qk_norm: bool, scale_norm: bool, proj_bias: bool,
                 attn_drop: float, proj_drop: float, norm_layer: type[nn.Module], device: object = None,
                 dtype: object = None, gated: bool = False) -> None:  # fmt: skip
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.scale = self.head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm_layer(dim) if scale_norm else nn.Identity()
        self.gate = nn.Linear(dim, dim, bias=qkv_bias) if gated else None
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        out = F.scaled_dot_product_attention(
            self.q_norm(q), self.k_norm(k), v, attn_mask, self.attn_drop.p if self.training else 0.0, is_causal
        )
        y = self.norm(out.transpose(1, 2).reshape(b, n, -1))
        if self.gate is not None:
            y = y * self.gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


class Block(nn.Module):
    """Norm, attention, sum; norm, two matrices, sum."""

    def __init__(self, dim: int, heads: int, attn_layer: type[nn.Module], **keywords: object) -> None:
        super().__init__()
        options = {"qkv_bias": True, "qk_norm": False, "scale_norm": False, "proj_bias": True, "attn_drop": 0.0}
        options |= {"proj_drop": 0.0, "norm_layer": nn.LayerNorm, "device": None, "dtype": None} | keywords
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attn_layer(dim, num_heads=heads, **options)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        x = x + self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        return x + self.mlp(self.norm2(x))
