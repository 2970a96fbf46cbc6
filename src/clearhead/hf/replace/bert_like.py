"""Self and cross attention as BERT's relatives write it: `query`, `key`, `value`, a cache, dropout on the weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clearhead.hf.replace.base import Interface, heads, past_of, remember, weights_if


class BertLike(Interface):
    """Mixed in before a `...SelfAttention` of that shape; `rotate` is for positions that turn queries and keys."""

    @property
    def is_causal(self) -> bool:
        """What the config says; a cross attention sees all keys, its mask says which."""
        return bool(getattr(self, "is_decoder", False))

    def rotate(self, q: Tensor, k: Tensor, v: Tensor, positions: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values before the cache."""
        return q, k, v

    def attention(
        self, hidden_states: Tensor, mask: Any, source: Tensor | None, cache: Any, output_attentions: Any,
        positions: Any = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Returns the joined heads [b, n, w], and weights or None."""
        layer: Any = self
        dim = layer.attention_head_size
        cross = source is not None
        part, ready = past_of(self, cache, cross)
        q = heads(layer.query(hidden_states), dim)
        if ready:
            kept = part.layers[layer.layer_idx]
            k, v = kept.keys, kept.values
        else:
            read = hidden_states if source is None else source
            k, v = heads(layer.key(read), dim), heads(layer.value(read), dim)
            if not cross:
                q, k, v = self.rotate(q, k, v, positions)
            k, v = remember(self, cache, part, k, v, cross)
        keywords: dict[str, Any] = weights_if(output_attentions)
        if cross:
            keywords["is_causal"] = False
        out_bnhd, weights = self.interface(
            q, k, v, mask, scaling=float(dim) ** -0.5, dropout=layer.dropout.p, **keywords
        )
        return out_bnhd.flatten(2), weights
