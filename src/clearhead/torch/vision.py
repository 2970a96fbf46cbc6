"""timm's attention with another mechanism: a class for `attn_layer=`, and what a built model's layers become.

timm is not imported: the class has timm's constructor keywords (1.0), its call `(x, attn_mask=None, is_causal=False)`
and its names (`qkv`, `q_norm`, `k_norm`, `norm`, `gate`, `proj`), so weights of one fit the other.

Legend: b batch, h heads, n tokens (of an image: class and register tokens, then patches row by row), d head dim,
p = h * d, w width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch.nn as nn
from torch import Tensor

from clearhead.attention.bias import DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec
from clearhead.functional import _split
from clearhead.torch.masks import Seen
from clearhead.torch.mixing import Patched, Projected, add_parts, called, mix, refuse_dropout


class TimmAttention(nn.Module):
    """Self attention of timm's blocks, by a spec of clearhead: proj(gate * norm(attend(q, k, v))).

    Get a class with its spec by `timm_attention("laser")`; timm builds the layers itself, one for each block. Numbers
    are timm's own for softmax. Temperatures read queries and values as `qkv` makes them, before `q_norm`.

    `attn_mask` is as in `scaled_dot_product_attention`: bool, True = attend, or float, added to the scores. Beside
    `is_causal` both hold. Raises `UserError` for attention dropout that the mechanism refuses.
    """

    spec: ClassVar[AttentionSpec] = AttentionSpec()
    clearhead_patch: Patched

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        refuse_dropout(self.spec, "attn_layer", attn_drop)
        if attn_head_dim is None and dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of dim={dim}, got {num_heads}")
        if (qk_norm or scale_norm) and norm_layer is None:
            raise ValueError("norm_layer: qk_norm and scale_norm need one")
        head_dim = dim // num_heads if attn_head_dim is None else attn_head_dim
        inner, where = num_heads * head_dim, {"device": device, "dtype": dtype}

        def norm(wanted: bool, size: int) -> nn.Module:
            return norm_layer(size, **where) if wanted and norm_layer is not None else nn.Identity()

        self.num_heads, self.head_dim, self.attn_dim = num_heads, head_dim, inner
        self.scale = head_dim**-0.5
        self.qkv = nn.Linear(dim, 3 * inner, bias=qkv_bias, **where)
        self.q_norm, self.k_norm = norm(qk_norm, head_dim), norm(qk_norm, head_dim)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(scale_norm, inner)
        self.gate = nn.Linear(dim, inner, bias=qkv_bias, **where) if gated else None
        self.proj = nn.Linear(inner, dim if dim_out is None else dim_out, bias=proj_bias, **where)
        self.proj_drop = nn.Dropout(proj_drop)
        self.clearhead_patch = Patched(self.spec)
        add_parts(self, self.clearhead_patch, self.qkv.weight, place=None)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[b, n, w] -> [b, n, w]; see the class."""
        called(self)
        bare = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for t in bare)
        q, k = self.q_norm(q), self.k_norm(k)
        out = mix(
            self.clearhead_patch,
            self,
            Projected(q.to(v.dtype), k.to(v.dtype), v, bare),
            _seen(attn_mask, is_causal),
            dropout_p=self.attn_drop.p if self.training else 0.0,
            scale=self.scale,
        ).out
        y = out.transpose(1, 2).flatten(2)
        norm, gate = getattr(self, "norm", None), getattr(self, "gate", None)  # older versions of timm have neither
        y = y if norm is None else norm(y)
        y = y if gate is None else y * gate(x).sigmoid()
        return self.proj_drop(self.proj(y))


def _seen(attn_mask: Tensor | None, is_causal: bool) -> Seen:
    mask = Mask.causal(0) if is_causal else Mask(offset=0)
    bias: DenseBias | None = None
    if attn_mask is not None:
        visible, bias = _split(attn_mask)
        mask = mask & visible
    return Seen(mask, bias)


@lru_cache(maxsize=64)
def timm_attention(spec: AttentionSpec | str) -> type[TimmAttention]:
    """A class for timm's `attn_layer=` that attends by `spec`: `VisionTransformer(attn_layer=timm_attention("laser"))`.

    The same spec gives the same class. State dicts fit those of timm's own attention; with `+selective` or `+learned`
    they hold `clearhead_temperatures` besides, which start without effect. Each layer of a performer draws the same
    features (`ch.torch.patch` on a built model draws others for each). Raises `UserError` for an unknown spec.
    """
    parsed = AttentionSpec.parse(spec)
    return type("TimmAttention", (TimmAttention,), {"spec": parsed, "__doc__": TimmAttention.__doc__})


def is_timm_attention(module: nn.Module) -> bool:
    """Whether the module is timm's own `Attention`, exactly: a subclass may compute something else."""
    kind = type(module)
    return kind.__name__ == "Attention" and kind.__module__ in (
        "timm.layers.attention",
        "timm.models.vision_transformer",  # before timm 1.0.17
    )


def refuse_timm(patched: Patched, name: str, layer: nn.Module) -> None:
    """Raise `UserError` for a layer that cannot have this spec, before anything is changed."""
    refuse_dropout(patched.spec, name, float(getattr(layer.attn_drop, "p", 0.0)))
