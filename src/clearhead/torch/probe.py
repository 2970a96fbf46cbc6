"""Does the model really call its patched layers? Small forwards, in the mode where torch's fast paths lurk."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


def probe_model(model: nn.Module, arguments: Sequence[Any] | Mapping[str, Any]) -> tuple[str, ...]:
    """One forward of the model on the user's arguments, in eval mode without gradients; then one that watches.

    Returns the classes of modules that called scaled_dot_product_attention themselves, outside of any patched layer.
    That needs a forward of its own: torch closes its fast paths while somebody watches its functions.
    """
    with _eval(model):
        _call(model, arguments)
        with _Watch() as watch:
            _call(model, arguments)
    return tuple(dict.fromkeys(watch.callers))


def _call(model: nn.Module, arguments: Sequence[Any] | Mapping[str, Any]) -> None:
    if isinstance(arguments, Mapping):
        model(**arguments)
    elif isinstance(arguments, tuple | list):
        model(*arguments)
    else:
        model(arguments)


class _Watch(TorchFunctionMode):
    """Who calls scaled_dot_product_attention: the innermost module on the stack, unless it is clearhead's own call."""

    def __init__(self) -> None:
        super().__init__()
        self.callers: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.scaled_dot_product_attention:
            frame: Any = sys._getframe(1)
            while frame is not None:
                if frame.f_globals.get("__name__", "").startswith("clearhead.attention."):
                    break
                if isinstance(frame.f_locals.get("self"), nn.Module):
                    self.callers.append(type(frame.f_locals["self"]).__qualname__)
                    break
                frame = frame.f_back
        return function(*args, **(kwargs or {}))


def probe_layers(model: nn.Module) -> set[nn.Module]:
    """Run torch's own transformer layers on a few random tokens, with and without padding.

    Returns the attentions that were to be called. Layers with a forward of their own, and weights that hold no numbers
    yet (meta device), are left out.
    """
    reached: set[nn.Module] = set()
    for layer in model.modules():
        if type(layer).forward not in (nn.TransformerEncoderLayer.forward, nn.TransformerDecoderLayer.forward):
            continue
        assert isinstance(layer, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer)
        attention = layer.self_attn
        weight = attention.out_proj.weight
        if weight.is_meta:
            continue
        shape = (2, 3) if attention.batch_first else (3, 2)
        x = torch.linspace(-1.0, 1.0, 6 * attention.embed_dim, dtype=weight.dtype, device=weight.device)
        x = x.view(*shape, attention.embed_dim)
        padding = torch.tensor([[False, False, True], [False, False, False]], device=weight.device)
        # The layer's own forward, not a call: hooks of the user are not for our tokens.
        with _eval(layer):
            for padded in (None, padding):
                if isinstance(layer, nn.TransformerDecoderLayer):
                    layer.forward(x, x, tgt_key_padding_mask=padded, memory_key_padding_mask=padded)
                else:
                    layer.forward(x, src_key_padding_mask=padded)
        reached.add(attention)
        if isinstance(layer, nn.TransformerDecoderLayer):
            reached.add(layer.multihead_attn)
    return reached


@contextmanager
def _eval(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module is in its own mode again afterwards."""
    modes = {m: m.training for m in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            yield
    finally:
        for m, training in modes.items():
            m.training = training
