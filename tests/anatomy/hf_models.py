"""A part of the zoo (`clearhead.hf.zoo_entries`) as it starts, without the zoo's stirring, in training mode."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn

from clearhead.hf.zoo_entries import ENTRIES, HEADS, HIDDEN, LAYERS, VOCABULARY, WIDTH

__all__ = ["HEADS", "HIDDEN", "LAYERS", "MODELS", "PLACEMENT", "VOCABULARY", "WIDTH", "batch_for", "build"]

NAMES = (
    "gpt2", "gpt_neo", "gptj", "gpt_neox", "opt", "opt-post", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2",
    "phi", "phi3", "olmo2", "bloom", "falcon", "bert", "roberta", "distilbert", "electra", "t5", "t5-gated", "bart",
    "mbart", "marian", "whisper", "vit",
)  # fmt: skip
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    name: (
        ENTRIES[name].model,
        ENTRIES[name].config,
        {key: value for key, value in ENTRIES[name].values.items() if key != "sliding_window"},  # nothing is cut off
    )
    for name in NAMES
}

PLACEMENT = {name: "pre" for name in MODELS} | dict.fromkeys(
    ("opt-post", "bert", "roberta", "distilbert", "electra", "bart", "marian"), "post"
)


def build(name: str, **changes: Any) -> nn.Module:
    """The model, in training mode, from seed 0."""
    import transformers

    transformers.logging.set_verbosity_error()
    kind, config, values = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, kind)(getattr(transformers, config)(**values | changes)).train()


def batch_for(name: str) -> dict[str, torch.Tensor]:
    """Three sequences of 12, 9 and 5 tokens padded on the right; labels where the loss needs them."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (3, 12))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    mask[2, 5:] = 0
    if name == "vit":
        return {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.tensor([0, 1, 1])}
    if name == "whisper":
        return {"input_features": torch.randn(2, 8, 60), "labels": torch.randint(3, VOCABULARY, (2, 7))}
    if name in ("t5", "t5-gated", "bart", "mbart", "marian"):
        labels = torch.randint(3, VOCABULARY, (3, 7))
        labels[1, 4:] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if name in ("bert", "roberta", "distilbert"):
        labels = torch.full_like(ids, -100)
        labels[:, 1] = 5
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return {"input_ids": ids, "attention_mask": mask}
