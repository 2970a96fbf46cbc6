"""What every replacement shares: the call of the attention that the patch registered.

Shapes: b batch, h query heads, g key/value heads, n queries, m keys, d head dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.mask import Mask
from clearhead.attention.terms import Band, Causal

if TYPE_CHECKING:
    _Module = nn.Module
else:
    _Module = object  # mixed in before a class of transformers, which is the module


class Interface(_Module):
    """Mixed in before a class of transformers: computes with the function registered for this module."""

    clearhead_config: Any
    clearhead_weights = False
    """Whether the call that runs was asked for weights: for stand-ins that replace a method below `forward`."""

    def interface(
        self, q_bhnd: Tensor, k_bgmd: Tensor, v_bgmd: Tensor, mask: Any, *, scaling: float, dropout: float = 0.0,
        **keywords: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Attention as an interface model would ask for it. Returns out [b, n, h, d], and weights or None."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        if self.clearhead_weights:
            keywords = keywords | {"output_attentions": True}
        function = ALL_ATTENTION_FUNCTIONS[self.clearhead_config._attn_implementation]
        out_bnhd, weights = function(
            self, q_bhnd, k_bgmd, v_bgmd, mask, dropout=dropout if self.training else 0.0, scaling=scaling, **keywords
        )
        return out_bnhd, weights


class KeepsForward(Interface):
    """For an original whose `forward` stays, and calls a method that is replaced."""

    def forward(self, *inputs: Any, output_attentions: bool | None = False, **keywords: Any) -> Any:
        """As the original's."""
        self.clearhead_weights = bool(output_attentions)
        return super().forward(*inputs, output_attentions=output_attentions, **keywords)


class ScoresOfGPTJ(KeepsForward):
    """GPT-J and CodeGen: positions and cache are the original's; the scores are `_attn`, which is all that is
    replaced."""

    scale_attn: Any
    attn_dropout: Any

    def _attn(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        # Rotary positions may have raised queries and keys to float32; scores are made in float32 by themselves.
        out_bnhd, weights = self.interface(
            query.to(value.dtype), key.to(value.dtype), value, attention_mask,
            scaling=1.0 / float(self.scale_attn), dropout=self.attn_dropout.p,
        )  # fmt: skip
        return out_bnhd.transpose(1, 2), weights


def causal_too(mask: Any, n: int, m: int) -> Any:
    """Causality on a mask of keys, for a model whose attention adds it itself: n queries behind m - n earlier keys."""
    from clearhead.hf.masks import VisibleKeys

    if isinstance(mask, VisibleKeys):
        if mask.shape[3] != m and not mask.mask.terms:  # it hides nothing and was made without a look at the cache
            return None
        return replace(mask, mask=Mask((Causal(), *mask.mask.terms), m - n), shape=(*mask.shape[:2], n, m))
    seen = visible(mask)
    if seen is None:
        return None
    return seen & torch.ones(n, m, dtype=torch.bool, device=seen.device).tril(m - n)


def weights_if(asked: Any) -> dict[str, bool]:
    """The keyword that asks for weights, when the model asked for them."""
    return {"output_attentions": True} if asked else {}


def past_of(module: Any, cache: Any, cross: bool) -> tuple[Any, bool]:
    """The part of a cache that this layer writes to, and whether a cross attention finds its keys there already."""
    from transformers.cache_utils import EncoderDecoderCache

    if not isinstance(cache, EncoderDecoderCache):
        ready = cross and cache is not None and cache.get_seq_length(module.layer_idx) > 0
        return cache, ready
    ready = cross and bool(cache.is_updated.get(module.layer_idx))
    return (cache.cross_attention_cache if cross else cache.self_attention_cache), ready


def remember(module: Any, cache: Any, part: Any, k: Tensor, v: Tensor, cross: bool) -> tuple[Tensor, Tensor]:
    """Write keys and values to the cache; returns all that it holds."""
    from transformers.cache_utils import EncoderDecoderCache

    if part is None:
        return k, v
    k, v = part.update(k, v, module.layer_idx)
    if cross and isinstance(cache, EncoderDecoderCache):
        cache.is_updated[module.layer_idx] = True
    return k, v


def heads(x_bnw: Tensor, dim: int) -> Tensor:
    """[b, n, h * d] -> [b, h, n, d]."""
    return x_bnw.unflatten(-1, (-1, dim)).transpose(1, 2)


def visible(mask: Tensor | None) -> Tensor | None:
    """A float mask (0, or the type's minimum) as a bool one, True = attend."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask > torch.finfo(mask.dtype).min / 2


def within_window(mask: Any, n: int, m: int, window: int) -> Any:
    """A causal mask narrowed to the last `window` keys of each query, its own among them."""
    from clearhead.hf.masks import VisibleKeys

    if isinstance(mask, VisibleKeys):
        return replace(mask, mask=mask.mask & Mask((Band(window - 1, 0),)))
    seen = visible(mask)
    if seen is None:
        return None
    return seen & torch.ones(n, m, dtype=torch.bool, device=seen.device).triu(m - n - window + 1)
