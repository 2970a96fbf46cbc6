"""The vector of a segment: the largest value over time of every state, in the chosen layers, side by side.

    v(x) = [max_t h_1(x)_t, ..., max_t h_L(x)_t]           padding is no time; layer L is taken behind the last norm

The seam to a model is narrow: it has `blocks`, each of which gives its layer's states when called, and a `norm` that is
called last. `layer_states` hooks these, runs the model as always, and ends the pass behind the norm: the product with
the output matrix is never taken. A block that runs once for each token (feedback memory) gives its tokens in turn.

Legend: b segments, t tokens, w width, f layers * width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.errors import UserError
from clearhead.models.seq2seq import Seq2Seq


class _Enough(Exception):
    """The last norm has spoken; what a model does behind it is not needed."""


def layer_states(model: nn.Module, tokens_bt: Tensor, valid_bt: Tensor | None = None) -> list[Tensor]:
    """Return the states behind each block, [b, t, w]; those of the last block are behind the last norm.

    model: a `Decoder`, an `Encoder`, the encoder of a `Seq2Seq`, or whatever has `blocks` and `norm` and takes
        `model(tokens, valid=...)`. Inside a wrapper (torch.compile) the model itself is run.
    valid_bt: bool, False = padding on the right.

    Raises `UserError` for a model that does not show its layers.
    """
    model = getattr(model, "_orig_mod", model)
    run: Callable[[], object]
    if isinstance(model, Seq2Seq):
        stack: nn.Module = model.encoder
        run = lambda: model.encode(tokens_bt, valid=valid_bt)
    else:
        stack = model
        run = lambda: model(tokens_bt, valid=valid_bt)
    blocks, norm = getattr(stack, "blocks", None), getattr(stack, "norm", None)
    if not isinstance(blocks, nn.ModuleList) or not isinstance(norm, nn.Module):
        raise UserError(f"{type(model).__name__} has no blocks and norm, so the states of its layers cannot be read")
    seen: list[list[Tensor]] = [[] for _ in blocks]
    last: list[Tensor] = []

    def end(module: nn.Module, arguments: object, output: Tensor) -> None:
        last.append(output)
        raise _Enough

    handles = [
        block.register_forward_hook(lambda module, arguments, output, layer=layer: seen[layer].append(output))
        for layer, block in enumerate(blocks)
    ]
    handles.append(norm.register_forward_hook(end))
    try:
        run()
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
    states = [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0] for parts in seen if parts]
    if not last or len(states) != len(blocks) or any(state.shape[:2] != tokens_bt.shape for state in states):
        raise UserError(f"{type(model).__name__} does not call its blocks and its norm, so its layers cannot be read")
    return [*states[:-1], last[0]]


def pool(states: Sequence[Tensor], valid_bt: Tensor | None = None) -> Tensor:
    """Return the largest value over real tokens of each component, the layers side by side, [b, f].

    Padding has no part in it, whatever stands there. A row without a real token raises `ValueError` (on the host it is
    looked at once; under compilation it is not).
    """
    if valid_bt is None:
        return torch.cat([state.amax(dim=1) for state in states], dim=-1)
    if not torch.compiler.is_compiling() and not bool(valid_bt.any(dim=1).all()):
        raise ValueError("pool: a segment without a real token has no vector")
    hidden_bt1 = ~valid_bt[..., None]
    return torch.cat([state.masked_fill(hidden_bt1, -torch.inf).amax(dim=1) for state in states], dim=-1)


def segment_vectors(
    model: nn.Module, tokens_bt: Tensor, valid_bt: Tensor | None = None, *, layers: Sequence[int]
) -> Tensor:
    """Return v(x) of each segment, [b, len(layers) * w].

    layers: numbers from 1; see `clearhead.objectives.config.pooled_layers`.
    """
    states = layer_states(model, tokens_bt, valid_bt)
    return pool([states[layer - 1] for layer in layers], valid_bt)
