"""BigBird: our block pattern in place of its own, which counts a block as often as it is named and is left for good
after one short batch.

A model with `attention_type="block_sparse"` takes specs with a bigbird pattern; one with "original_full" takes any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch.nn as nn
from torch import Tensor
from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdSelfAttention

from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec, BigBird
from clearhead.attention.terms import Causal
from clearhead.errors import UserError
from clearhead.hf.masks import VisibleKeys
from clearhead.hf.replace.base import causal_too
from clearhead.hf.replace.bert_like import BertLike


class _BigBird(BertLike):
    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See `BigBirdSelfAttention`."""
        mask = attention_mask if encoder_hidden_states is None else encoder_attention_mask
        if encoder_hidden_states is None and self.clearhead_config.is_decoder:
            mask = self._looking_back(mask, hidden_states.shape[1], past_key_values)
        asked = kwargs.get("output_attentions")
        return self.attention(hidden_states, mask, encoder_hidden_states, past_key_values, asked)

    def _looking_back(self, mask: Any, n: int, cache: Any) -> Any:
        """A decoder's mask: transformers up to 5.17 makes one for it that shows the future."""
        past = 0 if cache is None else cache.get_seq_length(self.layer_idx)
        if not isinstance(mask, VisibleKeys):
            return causal_too(mask, n, past + n)
        return mask if mask.mask.is_causal else replace(mask, mask=Mask((Causal(), *mask.mask.terms), past))


class ClearheadBigBirdSelfAttention(_BigBird, BigBirdSelfAttention):
    """`BigBirdSelfAttention` with the patched attention."""


class ClearheadBigBirdBlockSparseAttention(_BigBird, BigBirdBlockSparseAttention):  # type: ignore[misc]
    """`BigBirdBlockSparseAttention`, called as the full one is, with the patched attention's blocks."""

    class _NoDropout:
        p = 0.0

    dropout = _NoDropout()  # the original drops no weights

    @property
    def layer_idx(self) -> int:
        """The layer's number, which the original draws its random blocks by."""
        return int(self.seed)


CLASSES: dict[str, type[nn.Module]] = {
    "BigBirdSelfAttention": ClearheadBigBirdSelfAttention,
    "BigBirdBlockSparseAttention": ClearheadBigBirdBlockSparseAttention,
}


def refuse(model: nn.Module, spec: AttentionSpec) -> None:
    """Raise `UserError` for a sparse model and a spec that would make it dense."""
    for module in model.modules():
        if isinstance(module, BigBirdBlockSparseAttention) and not isinstance(spec.pattern, BigBird):
            own = BigBird(block_size=module.block_size, random_blocks=module.num_random_blocks)
            raise UserError(
                f"big_bird: this model's attention is block-sparse, and {str(spec)!r} sees other keys; take a spec "
                f"with the pattern {own} (the model's own sizes), or load it with attention_type='original_full'"
            )


def prepare(model: nn.Module, change: Callable[[Any, str, Any], None]) -> None:
    """Every part of the model makes masks and calls as it does for full attention: the blocks are in the spec."""
    for module in model.modules():
        if getattr(module, "attention_type", None) == "block_sparse":
            change(module, "attention_type", "original_full")
