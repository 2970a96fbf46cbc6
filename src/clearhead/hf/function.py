"""The attention function that transformers calls in each layer, in place of its own.

    fn(module, query, key, value, attention_mask, dropout=, scaling=, is_causal=, **keywords) -> (out, weights or None)

Query is [b, h, n, d], key and value [b, g, m, d] with g heads, not repeated; `out` is [b, n, h, e]. What belongs to one
layer (its name, its role, its temperatures) is found through `module`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import AttentionOutput, attend
from clearhead.attention.bias import Bias, DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.spec import AttentionSpec, Full
from clearhead.attention.terms import Band, Causal, KeyRange
from clearhead.errors import UserError
from clearhead.hf import keywords, masks, temperatures, written

Answer = tuple[Tensor, Tensor | None]
LAYER = "_clearhead_layer"
"""The attribute of a patched module that holds its `Layer`."""


@dataclass(frozen=True)
class Layer:
    """What a call needs to know of its layer."""

    name: str
    role: str


@dataclass(frozen=True, eq=False)
class Seen:
    """One call, as the probe is shown it."""

    module: nn.Module
    causal: bool
    queries: int
    keys: int
    dropout: float
    keywords: tuple[str, ...]


LISTENERS: list[Callable[[Seen], None]] = []
"""The probe stands here while it runs."""


@contextmanager
def listening(listener: Callable[[Seen], None]) -> Iterator[None]:
    """Show every call to `listener` inside a `with` block."""
    LISTENERS.append(listener)
    try:
        yield
    finally:
        LISTENERS.remove(listener)


def make_function(spec: AttentionSpec) -> Callable[..., Answer]:
    """The function for a spec; see the top of this file."""

    def clearhead_attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        dropout: float = 0.0,
        scaling: float | Tensor | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> Answer:
        layer = getattr(module, LAYER, None) or Layer(type(module).__name__, "")
        asked = keywords.read(others, layer.name)
        query, key, value = _alike(query, key, value)
        if isinstance(scaling, Tensor):  # a learned scale keeps its gradient on the queries
            query, scaling = query * scaling.to(query.dtype), 1.0
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        try:
            seen = masks.read(
                attention_mask, query.shape[2], key.shape[2], query.shape[0], causal=bool(causal),
                window=asked.sliding_window,
            )  # fmt: skip
            mask = seen.mask & _documents(asked, query.shape[2], key.shape[2])
            for listener in LISTENERS:
                listener(Seen(module, mask.is_causal, query.shape[2], key.shape[2], dropout, keywords.given(others)))
            key, value = _held(mask, query.shape[2], key, value)
            own = spec if layer.role != "cross" or isinstance(spec.pattern, Full) else replace(spec, pattern=Full())
            answer = _attend(module, layer, query, key, value, own, mask, seen, asked, dropout, scaling)
        except (ValueError, TypeError) as error:
            raise UserError(f"{layer.name}: {error}") from error
        weights = answer.extras.get("weights")
        out = answer.out.transpose(1, 2).contiguous()
        return out, None if weights is None else weights.to(out.dtype)

    return clearhead_attention


def _attend(
    module: nn.Module,
    layer: Layer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    spec: AttentionSpec,
    mask: Mask,
    seen: masks.Seen,
    asked: keywords.Asked,
    dropout: float,
    scaling: float | None,
) -> AttentionOutput:
    want = ("weights",) if asked.weights or weights_are_collected() else ()
    taus = None
    if spec.temperature is not None:
        windowed = asked.sliding_window is not None
        taus = temperatures.of(
            module, query, key, value, mask, spec, role=layer.role, windowed=windowed, dropped=seen.dropped
        )
    structured = asked.position_bias if isinstance(asked.position_bias, Bias) else None
    if structured is not None and seen.bias is not None:
        raise ValueError(f"a mask of numbers beside {type(structured).__name__} is not handled; give a bool mask")
    added = None if isinstance(asked.position_bias, Bias) else _sum(asked.position_bias, seen.bias, key.shape[2])
    if asked.softcap is None and asked.sinks is None:
        bias: Bias | None = structured if added is None else DenseBias(added)
        return attend(
            query, key, value, spec, mask=mask, bias=bias, temperatures=taus, scale=scaling, dropout_p=dropout,
            want=want,
        )  # fmt: skip
    reason = written.refuse(spec, asked.softcap, asked.sinks)
    if reason is not None:
        raise ValueError(f"attention {spec.text!r} cannot stand in here: {reason}")
    return written.attend_written(
        query, key, value, spec, mask=mask, bias=added, temperatures=taus, scale=scaling, dropout_p=dropout,
        softcap=asked.softcap, sinks=asked.sinks, want=want,
    )  # fmt: skip


def _held(mask: Mask, n: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Without the empty places behind the last query in a static cache, where causality alone tells what they are."""
    offset, m = mask.offset, key.shape[2]
    if not mask.is_causal or not isinstance(offset, int) or n + offset >= m:
        return key, value
    if not all(isinstance(term, Causal | Band | KeyRange) for term in mask.terms):
        return key, value
    return key[:, :, : n + offset], value[:, :, : n + offset]


def _sum(position_bias: Tensor | None, mask_bias: DenseBias | None, m: int) -> Tensor | None:
    """What is added to the scores, of four dimensions."""
    values = None if mask_bias is None else mask_bias.values
    if position_bias is None:
        return values if values is None or values.shape[-1] <= m else values[..., :m]
    full = position_bias[(None,) * (4 - position_bias.dim())] if position_bias.dim() < 4 else position_bias
    total = full if values is None else full + values
    return total[..., :m] if total.shape[-1] > m else total


def _alike(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One dtype, under autocast its own, as PyTorch's attention has it; one batch size, as it broadcasts."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    b = max(query.shape[0], key.shape[0])
    if query.shape[0] != b and query.shape[0] == 1:
        query = query.expand(b, -1, -1, -1)
    if key.shape[0] != b and key.shape[0] == 1:
        key, value = key.expand(b, -1, -1, -1), value.expand(b, -1, -1, -1)
    return query, key, value


def _documents(asked: keywords.Asked, n: int, m: int) -> Mask:
    """Packed documents by their ends, as the varlen kernels are told: segment numbers of queries and keys."""
    if asked.query_ends is None and asked.key_ends is None:
        return Mask()
    queries = asked.query_ends if asked.query_ends is not None else asked.key_ends
    keys = asked.key_ends if asked.key_ends is not None else asked.query_ends
    assert queries is not None
    assert keys is not None
    return Mask.segments(_numbers(queries, n), _numbers(keys, m))


def _numbers(ends: Tensor, length: int) -> Tensor:
    place = torch.arange(length, device=ends.device)
    return torch.bucketize(place, ends[1:].contiguous(), right=True)[None]


def weights_are_collected() -> bool:
    """Whether transformers is gathering attention weights in this forward (`output_attentions=True`).

    Its collector is no public name; where it is not found, `refuse_empty` still sees to it that nothing empty is
    returned.
    """
    try:
        from transformers.utils.output_capturing import _active_collector as collector
    except ImportError:
        return False
    held = collector.global_var if torch.compiler.is_compiling() else collector.get()
    return held is not None and any("attentions" in name for name in held)


def refuse_empty(module: nn.Module, inputs: Any, output: Any) -> None:
    """A forward hook on the model: attention weights that were asked for and are not there are an error."""
    crosses = any(
        getattr(inner, LAYER, None) is not None and getattr(inner, LAYER).role == "cross" for inner in module.modules()
    )
    for name in ("attentions", "cross_attentions", "decoder_attentions", "encoder_attentions"):
        found = getattr(output, name, None)
        if name == "cross_attentions" and not crosses:
            continue  # GPT-2 returns an empty one, for it has none
        if isinstance(found, tuple) and (not found or any(item is None for item in found)):
            raise UserError(
                f"output_attentions=True: {type(module).__name__} does not ask its attention for weights in a way that "
                f"a patched attention sees; leave it out, or unpatch the model first"
            )
