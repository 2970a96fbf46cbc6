"""Tiny random models for the tests of patching, and their inputs. Nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from tests.anatomy import hf_models

SPARSE = "bigbird:block_size=2,global_blocks=1,window_blocks=1,random_blocks=1"
"""A pattern that hides keys of a dozen tokens already."""
VOCABULARY = hf_models.VOCABULARY
_LLAMA = hf_models.MODELS["llama"][2]
_EXTRA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral-window": ("MistralForCausalLM", "MistralConfig", _LLAMA | {"sliding_window": 4}),
    "gemma3-window": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        _LLAMA | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        _LLAMA
        | {
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "sliding_window": 4,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}


DROPOUT = {"gpt2": "attn_pdrop", "bert": "attention_probs_dropout_prob", "t5": "dropout_rate"}
"""The config's word for dropout on attention weights, where it is not 0 by itself."""


def build(name: str, double: bool = True, **changes: Any) -> nn.Module:
    """A model in eval mode, in float64, without dropout on weights unless told otherwise.

    Parameters of one dimension are stirred, so that a sink or a bias that is dropped shows.
    """
    import transformers

    transformers.logging.set_verbosity_error()
    if name in DROPOUT:
        changes = {DROPOUT[name]: 0.0} | changes
    if name in _EXTRA:
        kind, config, values = _EXTRA[name]
        torch.manual_seed(0)
        model = getattr(transformers, kind)(getattr(transformers, config)(**values | changes))
    else:
        model = hf_models.build(name, **changes)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.eval()
    if name == "gpt_oss":  # its fused experts know no float64
        model.set_experts_implementation("eager")
    return model.double() if double else model


def eager(model: nn.Module) -> None:
    """Give a model its own attention written out; `set_attn_implementation` of 5.17 does not reach T5's halves."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None:
            config._attn_implementation_internal = "eager"


def batch_of(name: str, padding: str = "none", double: bool = True) -> dict[str, Tensor]:
    """Inputs of a model; `padding` "left" or "right" leaves sequences of 12, 9 and 5 tokens."""
    torch.manual_seed(1)
    dtype = torch.float64 if double else torch.float32
    if name == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, dtype=dtype)}
    if name == "whisper":
        sound = torch.randn(2, 8, 60, dtype=dtype)
        return {"input_features": sound, "decoder_input_ids": torch.randint(3, VOCABULARY, (2, 7))}
    ids = torch.randint(3, VOCABULARY, (3, 12))
    batch = {"input_ids": ids}
    if padding != "none":
        mask = torch.ones_like(ids)
        for row, length in ((1, 9), (2, 5)):
            if padding == "left":
                mask[row, : 12 - length] = 0
            else:
                mask[row, length:] = 0
        batch["attention_mask"] = mask
    if name in ("t5", "bart"):
        batch["decoder_input_ids"] = torch.randint(3, VOCABULARY, (3, 7))
    return batch


def answer(model: nn.Module, batch: dict[str, Any], **more: Any) -> Tensor:
    """The logits of the valid tokens."""
    out = model(**batch, **more).logits
    mask = batch.get("attention_mask")
    if mask is None or "decoder_input_ids" in batch or mask.shape != out.shape[:2]:
        return out
    return out[mask.bool()]


def shape_of(model: nn.Module) -> list[Any]:
    """Everything of a model but its numbers that a patch could leave behind: attributes, hooks, configs."""
    found: list[Any] = []
    for name, module in model.named_modules():
        hooks = [len(getattr(module, table)) for table in vars(module) if table.endswith("_hooks")]
        found.append((name, type(module), sorted(vars(module)), hooks, module.training))
        config = getattr(module, "config", None)
        if config is not None:
            found.append((config._attn_implementation, str(config.to_dict())))
    return found
