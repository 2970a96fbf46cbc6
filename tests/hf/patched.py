"""Patched tiny models whose temperatures are away from their start, and the runs that tests compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn as nn

import clearhead as ch
from clearhead.hf.temperatures import temperature_parameters
from tests.anatomy import hf_models

SPEC = "softmax+selective"


def build(name: str, **changes: Any) -> Any:
    """A tiny model in float32, in training mode, with the dropout of its config."""
    if name == "t5":
        import transformers

        if "ALL_ATTENTION_FUNCTIONS" not in vars(transformers.models.t5.modeling_t5):
            pytest.skip(f"T5 of transformers {transformers.__version__} does not use the attention interface")
    return hf_models.build(name, **changes)


def stir(model: nn.Module) -> None:
    """Random temperatures, far enough from the identity to be seen."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in temperature_parameters(model).values():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.copy_(parameter + (0.3 * noise.abs() if parameter.numel() == 1 else 3.0 * noise))


def selective(name: str, spec: str = SPEC, **changes: Any) -> Any:
    """A tiny model in float64, patched and stirred, in eval mode."""
    model = louder(build(name, **changes)).double().eval()
    ch.hf.patch(model, spec)
    stir(model)
    return model


def louder(model: nn.Module) -> nn.Module:
    """Weights of 0.02 make attention almost uniform, which hides what a temperature does."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "embed" not in name and "wpe" not in name and "wte" not in name:
                parameter.mul_(5.0)
    return model


def ids(rows: int, length: int, seed: int = 5) -> torch.Tensor:
    """Random tokens, none of them padding."""
    return torch.randint(3, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def in_chunks(model: Any, tokens: torch.Tensor, sizes: tuple[int, ...], **others: Any) -> torch.Tensor:
    """Logits of tokens that are handed over piece by piece, with a cache between."""
    cache, done, logits = others.pop("past_key_values", None), 0, []
    mask, positions = others.pop("attention_mask", None), others.pop("position_ids", None)
    for size in sizes:
        part = slice(done, done + size)
        given = dict(others)
        if mask is not None:
            given["attention_mask"] = mask[:, : done + size]
        if positions is not None:
            given["position_ids"] = positions[:, part]
        out = model(tokens[:, part], past_key_values=cache, use_cache=True, **given)
        cache, done = out.past_key_values, done + size
        logits.append(out.logits)
    assert done == tokens.shape[1]
    return torch.cat(logits, dim=1)
