"""One forward on made-up inputs, to see which layers call the attention that was set."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy import names
from clearhead.anatomy.attention import look_into
from clearhead.errors import UserError
from clearhead.hf.function import Seen, listening

LENGTH, TARGET = 12, 7
"""Tokens of the inputs; those of a decoder are fewer, so that cross attention shows by its lengths."""
_ATTENTION = re.compile(r"Attention|Attn")


@dataclass
class Calls:
    """What the probe saw of one module."""

    count: int = 0
    causal: bool = False
    cross: bool = False
    dropout: float = 0.0
    keywords: tuple[str, ...] = ()


def run(model: nn.Module, batch: Mapping[str, Any], training: Collection[nn.Module] = ()) -> dict[nn.Module, Calls]:
    """Run `batch` through the model in eval mode, without gradients and without a trace in the random state.

    The modules in `training` are told that they train (they alone: their dropout shows in what they pass on).
    """
    seen: dict[nn.Module, Calls] = {}

    def listen(call: Seen) -> None:
        own = seen.setdefault(call.module, Calls())
        own.count += 1
        own.causal = own.causal or call.causal
        own.cross = own.cross or call.queries != call.keys
        own.dropout = max(own.dropout, float(call.dropout or 0.0))
        own.keywords = tuple(dict.fromkeys((*own.keywords, *call.keywords)))

    with listening(listen), _quiet(model, training), torch.random.fork_rng(devices=_devices(model)), torch.no_grad():
        model(**batch)
    return seen


def _devices(model: nn.Module) -> list[torch.device]:
    return list({p.device for p in model.parameters() if p.device.type == "cuda"})


@contextmanager
def _quiet(model: nn.Module, training: Collection[nn.Module]) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = module in training
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- which modules hold attention -----------------------------------------------------------------------------------


def attention_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold an attention, by path: those with matrices for query, key and value (or one for all three), and
    those that are called attention and hold no other."""
    found: dict[str, nn.Module] = {}
    called = {path for path, module in model.named_modules() if _ATTENTION.search(type(module).__name__)}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) or look_into(model, path, module) is not None:
            found[path] = module
    for path in sorted(called):
        inner = [other for other in (*called, *found) if other != path and _inside(other, path)]
        around = [other for other in found if _inside(path, other)]
        module = model.get_submodule(path)
        if not inner and not around and next(module.parameters(), None) is not None:
            found[path] = module
    return found


def _inside(path: str, other: str) -> bool:
    """Whether `path` is `other` or lies in it."""
    return path == other or not other or path.startswith(f"{other}.")


def missed(model: nn.Module, expected: Mapping[str, nn.Module], called: Mapping[nn.Module, Any]) -> list[str]:
    """Paths of attentions of which neither they, nor what they hold, nor what holds them, called."""
    callers = [path for path, module in model.named_modules() if module in called]
    return [path for path in expected if not any(_inside(other, path) or _inside(path, other) for other in callers)]


def parts_that_hold(model: nn.Module, paths: list[str]) -> list[Any]:
    """The innermost models of transformers, inside `model`, that hold these modules."""
    from transformers import PreTrainedModel

    parts: dict[int, Any] = {}
    for path in paths:
        above = path
        while above := above.rpartition(".")[0]:
            part = model.get_submodule(above)
            if isinstance(part, PreTrainedModel):
                parts[id(part)] = part
                break
    return list(parts.values())


def role_of(path: str, module: nn.Module, calls: Calls) -> str:
    """causal | bidirectional | cross."""
    plain = names.plain(path.rpartition(".")[2]) + "." + names.plain(type(module).__name__)
    if calls.cross or getattr(module, "is_cross_attention", False) is True or any(x in plain for x in names.CROSS[:3]):
        return "cross"
    return "causal" if calls.causal else "bidirectional"


# ---- made-up inputs -------------------------------------------------------------------------------------------------


def make_batch(model: Any) -> dict[str, Tensor]:
    """One sequence (picture, sound) of the shape that the model's config and `forward` ask for.

    Raises `UserError` where nothing is known to fit: pass `probe=`.
    """
    taken = set(inspect.signature(model.forward).parameters)
    main = model.main_input_name
    config = model.config
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys((main, "input_ids", "pixel_values", "input_features", "input_values")):
        if name in taken and (name == main or _needed(model, name)):
            batch[name] = _one(model, name, config)
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in taken:
        batch["decoder_input_ids"] = _ids(model, config, TARGET)
    if "encoder_hidden_states" in taken and getattr(config, "add_cross_attention", False):
        batch["encoder_hidden_states"] = torch.zeros(1, TARGET, config.hidden_size)
        batch[main] = _one(model, main, config)
    first = next(model.parameters())
    return {
        name: value.to(first.device, first.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def _needed(model: Any, name: str) -> bool:
    """Whether an input beside the main one is needed: pictures beside words, where both have a tower of their own."""
    config = model.config
    return hasattr(config, "vision_config") and hasattr(config, "text_config") and hasattr(config, "projection_dim")


def _one(model: Any, name: str, config: Any) -> Tensor:
    makers = {
        "input_ids": lambda: _ids(model, getattr(config, "text_config", config), LENGTH),
        "pixel_values": lambda: _picture(getattr(config, "vision_config", config)),
        "input_features": lambda: _spectrum(config),
        "input_values": lambda: _sound(config),
    }
    if name not in makers:
        raise UserError(f"{type(model).__name__}: no input is known for {name!r}; pass one batch of yours as probe=")
    return makers[name]()


def _ids(model: Any, config: Any, length: int) -> Tensor:
    words = int(getattr(config, "vocab_size", 0) or 0)
    if words < 2:
        raise UserError(f"{type(model).__name__}: its config has no vocab_size; pass one batch of yours as probe=")
    special = {getattr(config, name, None) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    plain = [word for word in range(min(words, 64)) if word not in special] or [0]
    return torch.tensor([[plain[i % len(plain)] for i in range(length)]])


def _picture(config: Any) -> Tensor:
    size = getattr(config, "image_size", None) or 224
    high, wide = (size, size) if isinstance(size, int) else tuple(size)
    return torch.zeros(1, int(getattr(config, "num_channels", 3) or 3), high, wide)


def _spectrum(config: Any) -> Tensor:
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return torch.zeros(1, config.num_mel_bins, 2 * config.max_source_positions)
    width = next((getattr(config, n) for n in ("input_feat_per_channel", "feature_size") if hasattr(config, n)), 80)
    return torch.zeros(1, 40, int(width))


def _sound(config: Any) -> Tensor:
    if hasattr(config, "conv_stride"):
        samples = LENGTH
        for stride, kernel in zip(reversed(config.conv_stride), reversed(config.conv_kernel), strict=True):
            samples = (samples - 1) * stride + kernel
        return torch.sin(torch.arange(samples) * 0.1)[None]
    return torch.zeros(1, int(getattr(config, "max_length", 1024)), int(getattr(config, "num_mel_bins", 128)))
