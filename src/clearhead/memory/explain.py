"""`explain_memory`: what a decoder's memory holds and costs, layer by layer, without building the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from clearhead.attention.explain import explain
from clearhead.attention.mask import Mask
from clearhead.attention.terms import Band
from clearhead.errors import UserError
from clearhead.memory.layout import memory_bytes
from clearhead.models.config import ModelConfig


@dataclass(frozen=True)
class LayerMemory:
    """One layer, once its memory is full."""

    tokens: int
    """That it remembers."""
    bytes: int
    """Of the remembered layer inputs, all rows together."""
    keys: float
    """Keys that a query sees, the mean over a segment."""
    backend: str
    """What computes its attention."""


@dataclass(frozen=True)
class MemoryExplanation:
    """The layers from the lowest up; prints as a table."""

    layout: str
    segment: int
    layers: tuple[LayerMemory, ...]
    stream_bytes: int
    """What decoding holds at most besides: keys and values since the segment began, and the open segment's inputs."""

    @property
    def tokens(self) -> int:
        """That all layers remember together."""
        return sum(layer.tokens for layer in self.layers)

    @property
    def bytes(self) -> int:
        """Of all layers; `SegmentMemory.bytes` of a full memory."""
        return sum(layer.bytes for layer in self.layers)

    @property
    def keys(self) -> float:
        """Keys that a query sees in all layers together."""
        return sum(layer.keys for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"memory {self.layout}, segments of {self.segment} tokens", "layer  tokens  bytes  keys per query"]
        for number, layer in enumerate(self.layers):
            lines.append(f"{number}  {layer.tokens}  {layer.bytes}  {layer.keys:g}  {layer.backend}")
        return "\n".join([*lines, f"all  {self.tokens}  {self.bytes}  {self.keys:g}"])


def explain_memory(
    config: ModelConfig,
    *,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    dropout_p: float = 0.0,
) -> MemoryExplanation:
    """Tell what `config.memory` means for segments of `config.context` tokens.

    With range=memory a query sees M keys and those of its segment up to itself, M + (c + 1) / 2 in the mean over c
    tokens; with range=window M + 1; a window in the attention's pattern cuts off further.

    Raises `UserError` when the config has no memory. (A config whose memory is refused cannot be made.)
    """
    layout, segment = config.memory_layout, config.context
    if layout is None:
        raise UserError("memory: this config has none; say how much, such as full:512")
    lengths = layout.lengths(config.layers, segment)
    element = dtype.itemsize
    shown: dict[int, LayerMemory] = {}
    masks = {length: Mask.causal(length) for length in lengths}
    for length, mask in masks.items():
        if layout.windowed:
            masks[length] = mask = Mask((*mask.terms, Band(length, 0)), length)
        q, k, v = (
            torch.empty(batch, heads, tokens, size, dtype=dtype, device=device)
            for heads, tokens, size in (
                (config.heads, segment, config.key_size),
                (config.key_value_heads, length + segment, config.key_size),
                (config.key_value_heads, length + segment, config.head_size),
            )
        )
        seen = config.spec.pattern.within(mask, config.heads, length + segment)
        shown[length] = LayerMemory(
            tokens=length,
            bytes=memory_bytes((length,), batch=batch, width=config.width, element_size=element),
            keys=float(seen.visible_count(segment, length + segment, device).double().mean()),
            backend=explain(config.spec, (q, k, v), mask=mask, dropout_p=dropout_p).chosen,
        )
    per_key = config.key_value_heads * (config.key_size + config.head_size)
    return MemoryExplanation(
        layout=str(layout),
        segment=segment,
        layers=tuple(shown[length] for length in lengths),
        stream_bytes=batch * element * sum((n + segment) * per_key + segment * config.width for n in lengths),
    )
