"""What Hugging Face's models say of themselves: their config, and attributes that their modules share.

Nothing of transformers is imported: a model is known by its config's `model_type`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn as nn

from clearhead.anatomy.rules import Rules

CAUSAL = {"openai-gpt", "bloom", "clip_text_model", "ctrl", "codegen", "mpt", "xglm", "imagegpt"}
"""Decoders whose attention does not carry `is_causal`."""
PARALLEL = {"gptj", "codegen", "phi", "cohere", "cohere2"}
INTERLEAVED = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}
UNSCALED = {"gpt_neo"}
ROTARY_WITHOUT_CONFIG = {"gptj", "codegen"}


class HuggingFaceRules(Rules):
    """Rules of a `PreTrainedModel`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.family = str(self.config.model_type)
        self._say_what_is_left_out()

    def interleaved(self, holder: nn.Module, path: str) -> str | None:
        """See `Rules`."""
        if self.family in INTERLEAVED:
            return "heads"
        if self.family == "codegen":
            return "fours"
        if self.family == "gpt_bigcode":
            return None if self.config.multi_query else "heads"
        if self.family == "falcon":
            if self.config.new_decoder_architecture:
                return "groups"
            return None if self.config.multi_query else "heads"
        return None

    def causal(self, holder: nn.Module, around: Iterable[nn.Module]) -> bool:
        """See `Rules`."""
        if self.family in CAUSAL:
            return True
        return any(getattr(holder, name, False) is True for name in ("is_causal", "is_decoder"))

    def scale(self, holder: nn.Module, head_dim: int) -> float | None:
        """See `Rules`."""
        return 1.0 if self.family in UNSCALED else super().scale(holder, head_dim)

    def rope_base(self, holder: nn.Module) -> float | None:
        """See `Rules`. Of several bases (ModernBERT's local and global layers) the holder's own kind."""
        rope: Any = getattr(self.config, "rope_parameters", None)
        if isinstance(rope, dict):
            nested = [value for value in rope.values() if isinstance(value, dict)]
            if nested:
                sliding = getattr(holder, "sliding_window", None) is not None
                rope = rope.get("sliding_attention" if sliding else "full_attention", nested[0])
            if isinstance(rope, dict) and rope.get("rope_theta") is not None:
                if rope.get("partial_rotary_factor", 1.0) not in (None, 1.0):
                    self.assume("rotary positions turn only a part of each head")
                return float(rope["rope_theta"])
        theta = getattr(self.config, "rope_theta", None)
        if theta is not None:
            return float(theta)
        return 10000.0 if self.family in ROTARY_WITHOUT_CONFIG else None

    def placement(
        self, block: nn.Module, path: str, norms: list[nn.Module], branches: list[nn.Module], final: bool
    ) -> str:
        """See `Rules`: a model of Hugging Face has a norm behind its blocks exactly when they are pre-norm."""
        return "pre" if final else "post"

    def parallel(self, block: nn.Module) -> bool:
        """See `Rules`."""
        if self.family in PARALLEL:
            return True
        if self.family == "gpt_neox":
            return bool(self.config.use_parallel_residual)
        return self.family == "falcon" and bool(self.config.new_decoder_architecture or self.config.parallel_attn)

    def head(self) -> nn.Module | None:
        """See `Rules`."""
        get = getattr(self.model, "get_output_embeddings", None)
        try:
            return None if get is None else get()
        except NotImplementedError:
            return None

    def head_scale(self) -> float:
        """See `Rules`: T5 divides by sqrt(width) before a tied head, Cohere and Granite scale the logits."""
        config = self.config
        if getattr(config, "scale_decoder_outputs", False):
            return float(config.d_model) ** -0.5
        if getattr(config, "logits_scaling", None):
            return 1.0 / float(config.logits_scaling)
        return float(getattr(config, "logit_scale", None) or 1.0) if self.family.startswith("cohere") else 1.0

    def final_norm_is_embedding_norm(self) -> bool:
        """See `Rules`: Wav2Vec2 and its kin keep one norm beside their layers, in front of post-norm ones."""
        return getattr(self.config, "do_stable_layer_norm", None) is False

    def batch_first(self) -> bool:
        """See `Rules`."""
        return True

    def _say_what_is_left_out(self) -> None:
        config = self.config
        for name, text in (
            ("attn_logit_softcapping", "scores are capped by a tanh before the softmax"),
            ("final_logit_softcapping", "logits are capped by a tanh"),
            ("scale_attn_by_inverse_layer_idx", "scores are divided by the layer's number"),
            ("residual_multiplier", "branches are multiplied by residual_multiplier before they are added"),
        ):
            value = getattr(config, name, None)
            if value not in (None, False, 1.0):
                self.assume(f"{self.family}: {text}; the description has no place for it")
        if any("relative_attention_bias" in name for name, _ in self.model.named_parameters()):
            self.assume(
                f"{self.family}: the scores get a learned bias by relative position; the theory is without it, what is "
                f"measured is with it"
            )


def recognises(model: nn.Module) -> bool:
    """Whether the model has a Hugging Face config."""
    return isinstance(getattr(getattr(model, "config", None), "model_type", None), str)
