"""What the patched layers share: a spec, and one call of `attend` with its temperatures.

Legend: b batch, h heads, n queries, m keys, d head dim, p = h * d.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import AttentionOutput, attend
from clearhead.attention.projection import projection_of
from clearhead.attention.spec import AttentionSpec, Full, Laser, Learned, Performer, Selective
from clearhead.errors import UserError
from clearhead.layers.geometry import Geometry
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures
from clearhead.torch.masks import Seen

TEMPERATURES = "clearhead_temperatures"
"""The name of the submodule that holds a layer's temperatures, in state dicts and for PEFT's `modules_to_save`."""

FEATURES = "clearhead_features"
"""The buffer of a performer's rows, [m, d]; not in state dicts, since seed and place say all of it."""


@dataclass(frozen=True)
class Patched:
    """What a patched layer keeps of its patch."""

    spec: AttentionSpec
    role: str = "bidirectional"
    original: type[nn.Module] | None = None


@dataclass(frozen=True, eq=False)
class Projected:
    """Queries [b, h, n, d], keys and values [b, h, m, d], and each as its matrix made it: [b, n|m, p], for
    temperatures."""

    query: Tensor
    key: Tensor
    value: Tensor
    bare: tuple[Tensor, Tensor, Tensor]


def mix(
    patched: Patched,
    layer: nn.Module,
    x: Projected,
    seen: Seen,
    *,
    dropout_p: float,
    scale: float | None = None,
    want: tuple[str, ...] = (),
) -> AttentionOutput:
    """`attend` by the patch's spec. Raises `ValueError` for a pattern over keys that are not the queries' own text."""
    spec = patched.spec
    n, m = x.query.shape[2], x.key.shape[2]
    if n != m and not isinstance(spec.pattern, Full):
        raise ValueError(
            f"attention {spec.text!r}: {spec.pattern.name} counts distances within one text, and this call has {n} "
            f"queries over {m} keys; patch layers of cross attention without a pattern"
        )
    temperatures = getattr(layer, TEMPERATURES, None)
    taus = None if temperatures is None else temperatures(*x.bare, _geometry(spec, x, seen))
    return attend(
        x.query, x.key, x.value, spec, mask=seen.mask, bias=seen.bias, temperatures=taus, scale=scale,
        dropout_p=dropout_p, want=want, projection=getattr(layer, FEATURES, None),
    )  # fmt: skip


def _geometry(spec: AttentionSpec, x: Projected, seen: Seen) -> Geometry:
    """What selective temperatures count: keys that a query sees; for keys and values their position when attention is
    causal, else how many keys compete (in cross attention those of the whole source).
    """
    _, heads, n, _ = x.query.shape
    m, device = x.key.shape[2], x.query.device
    places = torch.arange(m, device=device)[None]
    if not isinstance(spec.temperature, Selective):
        return Geometry(positions=places, mask=seen.mask)
    mask = spec.pattern.within(seen.mask, heads, m)
    visible = mask.visible_count(n, m, device)
    own = visible if n == m else visible.amax(dim=-1, keepdim=True)
    if mask.is_causal:
        start = 0 if seen.first is None else seen.first[:, None]
        own = (places - start + 1)[:, None]
    return Geometry(positions=places, mask=seen.mask, visible=visible, own=own)


# ---- making a patch ----


def add_parts(layer: Any, patched: Patched, like: Tensor, *, place: int | None, options: Any = None) -> None:
    """Give a layer what its spec needs, on the device and in the dtype of `like`: temperatures with no effect at their
    start, or the features of layer number `place`; None = `attend` draws those that all layers share.

    options: `on`, `granularity`, `parts` and `slope` of `SelectiveTemperatures`, as attributes or as a dict.
    """
    spec = patched.spec
    temperatures: nn.Module | None = None
    if isinstance(spec.temperature, Learned):
        temperatures = LearnedTemperatures(layer.num_heads)
    elif isinstance(spec.temperature, Selective):
        values = {"slope": "linear"} | dict(_fields(options))
        temperatures = SelectiveTemperatures(layer.num_heads, layer.num_heads, layer.head_dim, **values)
    drawn = isinstance(spec.weights, Performer) and place is not None
    if like.is_meta and (temperatures is not None or drawn):
        raise UserError(f"attention {spec.text!r}: what it adds has a start; make the weights real, then patch")
    if temperatures is not None:
        layer.add_module(TEMPERATURES, temperatures.to(like.device, like.dtype).train(layer.training))
    if isinstance(spec.weights, Performer) and place is not None:
        rows = projection_of(spec.weights, layer.head_dim, place=place).to(like.device)
        layer.register_buffer(FEATURES, rows, persistent=False)


def remove_parts(layer: nn.Module) -> None:
    """Undo `add_parts`."""
    layer._modules.pop(TEMPERATURES, None)
    layer._buffers.pop(FEATURES, None)
    layer._non_persistent_buffers_set.discard(FEATURES)


def _fields(options: Any) -> Iterator[tuple[str, Any]]:
    for name in ("on", "granularity", "parts", "slope"):
        value = options.get(name) if isinstance(options, Mapping) else getattr(options, name, None)
        if value is not None:
            yield name, value


def refuse_dropout(spec: AttentionSpec, name: str, rate: float) -> None:
    """Raise `UserError` for attention dropout that a mechanism cannot have, before anything is changed."""
    for mechanism in (spec.read, spec.weights):
        if rate > 0.0 and isinstance(mechanism, Laser | Performer):
            raise UserError(
                f"{name}: {mechanism.name} refuses attention dropout, and this layer has {rate:g}; set it to 0 before "
                "the patch (docs/adopt-torch.md shows how) and drop out the layer's output instead"
            )


def for_role(spec: AttentionSpec, role: str) -> AttentionSpec:
    """The spec of a layer: cross attention takes every choice but the pattern, as in clearhead's own models."""
    return dataclasses.replace(spec, pattern=Full()) if role == "cross" else spec


# ---- counting calls ----

_count: Callable[[nn.Module], None] | None = None


def called(layer: nn.Module) -> None:
    """Every patched layer says that its own forward runs. Not a hook: a hook would close the fast path by itself."""
    if _count is not None:
        _count(layer)


@contextmanager
def counting() -> Iterator[dict[nn.Module, int]]:
    """How often each patched layer is called while the block lasts."""
    global _count
    calls: dict[nn.Module, int] = {}

    def count(layer: nn.Module) -> None:
        calls[layer] = calls.get(layer, 0) + 1

    before, _count = _count, count
    try:
        yield calls
    finally:
        _count = before
