"""Selective Self-Attention on the attention modules of a pretrained model.

`install` gives each attention module a child, `clearhead_temperatures`, which holds the parameters: a module with a
name of its own, so that PEFT's `modules_to_save`, FSDP and safetensors treat it like any other. Two hooks feed it. One
stands on the matrix of the queries and keeps its answer for the call; the other stands on the attention module and
sees to it that the first follows when PEFT puts a wrapper around that matrix. `of` is called by the attention function
and turns what was kept, the values, and the mask into the call's `Temperatures`.

Queries are scaled inside the attention function: after QK-norm, which would cancel a scale, and after rotary, with
which it commutes. Values are neither turned nor normed, so f reads them where the function gets them, and a cache holds
them as the model made them; a token's tau is worked out again at each call from its value and its place, which is
why decoding from any cache gives what a full forward gives.

Nothing here refers from one module to another: a deep copy, a replica of `nn.DataParallel` and a model that FSDP has
taken apart carry their own.

Legend: b batch, h query heads, g key/value heads, n query rows, m keys, d head dim, p = heads * d.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.rules import Rules
from clearhead.attention.mask import Mask
from clearhead.attention.selective import Temperatures
from clearhead.attention.spec import AttentionSpec, Learned
from clearhead.errors import UserError
from clearhead.hf.counts import query_counts, value_counts
from clearhead.hf.options import TemperatureOptions as TemperatureOptions
from clearhead.hf.projections import Slice, projections_of
from clearhead.layers.geometry import Geometry
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures

NAME = "clearhead_temperatures"
"""The child of each attention module that holds its temperatures: what PEFT's `modules_to_save` is given."""

_KEPT = "_clearhead_kept"
_READING = "_clearhead_reading"


@dataclass(frozen=True)
class Reading:
    """What `of` must know of one attention module."""

    query: Slice | None
    """The projection that is kept; None: the queries have no temperature that reads one."""
    fused: Slice | None
    """Where the values lie in the same answer, if they do."""
    options: TemperatureOptions | None
    """None: learned temperatures."""
    values: tuple[int, int] = (0, 0)
    """Heads of the values, and their size, as f was made for them."""
    checked: bool = False


def install(
    model: nn.Module,
    attentions: Iterable[str],
    spec: AttentionSpec | str,
    options: TemperatureOptions | None = None,
) -> int:
    """Give the attention modules with these paths the temperatures that `spec` names; return the parameters added.

    The parameters have the dtype and the device of the query's matrix. Selective ones start as the identity (with
    slope="linear"), learned ones always do. Raises `UserError`, naming the module, where projections or heads are not
    found, and when temperatures are there already; the model is then as it was.
    """
    spec = AttentionSpec.parse(spec)
    if spec.temperature is None:
        return 0
    options = TemperatureOptions() if options is None else options
    paths = list(attentions)
    for path in paths:
        if hasattr(model.get_submodule(path), NAME):
            raise UserError(f"{path} has temperatures already; call clearhead.hf.unpatch(model) first")
    makers = _learned(model, paths) if isinstance(spec.temperature, Learned) else _selective(model, paths, options)
    for path, (reading, temperatures) in makers.items():
        module = model.get_submodule(path)
        like = next(p for p in module.parameters())
        dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()  # quantised weights
        module.add_module(NAME, temperatures.to(device=like.device, dtype=dtype).train(module.training))
        module.__dict__[_READING] = reading
        if reading.query is not None:
            module.get_submodule(reading.query.child).register_forward_hook(_keep)
            module.register_forward_pre_hook(_follow)
    return sum(p.numel() for _, temperatures in makers.values() for p in temperatures.parameters())


def _selective(
    model: nn.Module, paths: list[str], options: TemperatureOptions
) -> dict[str, tuple[Reading, SelectiveTemperatures]]:
    made = {}
    for path, found in projections_of(model, paths).items():
        temperatures = SelectiveTemperatures(
            found.heads, found.kv_heads, found.head_dim,
            on=options.on, granularity=options.granularity, parts=options.parts, slope=options.slope,
        )  # fmt: skip
        reads = "query" in options.on
        fused = found.value if found.query.fused and found.value.child == found.query.child else None
        values = (found.kv_heads, found.head_dim)
        made[path] = (Reading(found.query if reads else None, fused, options, values), temperatures)
    return made


def _learned(model: nn.Module, paths: list[str]) -> dict[str, tuple[Reading, LearnedTemperatures]]:
    rules = Rules(model)
    made = {}
    for path in paths:
        names = path.split(".")
        around = [model.get_submodule(".".join(names[:end])) for end in range(len(names) - 1, -1, -1)]
        heads = rules.head_count(model.get_submodule(path), around)
        if heads is None:
            raise UserError(f"{path}: nothing says how many heads it has, which learned temperatures are one for each")
        made[path] = (Reading(None, None, None), LearnedTemperatures(heads))
    return made


def remove(model: nn.Module) -> None:
    """Take away what `install` added."""
    for module in list(model.modules()):
        if _READING in module.__dict__:
            _remove(module._forward_pre_hooks, _follow)
            del module.__dict__[_READING]
            delattr(module, NAME)
        _remove(module._forward_hooks, _keep)
        module.__dict__.pop(_KEPT, None)


def of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    spec: AttentionSpec,
    *,
    role: str,
    windowed: bool = False,
    dropped: Tensor | int = 0,
) -> Temperatures | None:
    """The temperatures of one call of the attention function, or None for a module that has none.

    Args:
        module, query, key, value: as the attention function gets them, [b, h, n, d] and [b, g, m, d].
        mask: what the call lets its queries see, without the spec's own pattern.
        role: causal | bidirectional | cross.
        windowed, dropped: a sliding window in the mask, and what a cache has dropped behind it; see `counts`.

    Raises `UserError` where the projection of the queries did not run, and where it is not what the function got.
    """
    reading: Reading | None = module.__dict__.get(_READING)
    if reading is None:
        return None
    temperatures = getattr(module, NAME)
    options = reading.options
    one = torch.ones(1, 1, 1, dtype=torch.int64, device=query.device)
    if options is None:
        return temperatures(query, None, None, Geometry(positions=one[0], mask=mask, visible=one))
    n, m = query.shape[2], key.shape[2]
    answer = q_bnp = None
    if reading.query is not None:
        answer = _kept(module, reading.query.child)
        q_bnp = reading.query.read(answer).reshape(query.shape[0], n, -1)
    if not reading.checked and n == m and not torch.compiler.is_compiling():
        _check(reading, answer, value)
        module.__dict__[_READING] = replace(reading, checked=True)
    v_bmp = _values(value, reading).transpose(1, 2).flatten(2) if "value" in options.on else None
    seen = own = one
    if options.position:
        seen = query_counts(spec, mask, query.shape[1], n, m, query.device)
        if "value" in options.on:
            own = value_counts(role, seen, mask, n, m, reading.values[0], windowed=windowed, dropped=dropped)
    taus = temperatures(q_bnp, None, v_bmp, Geometry(positions=one[0], mask=mask, visible=seen, own=own))
    if taus.value is None or value.shape[1] == reading.values[0]:
        return taus
    return replace(taus, value=taus.value.repeat_interleave(value.shape[1] // reading.values[0], dim=1))


def _keep(module: nn.Module, args: tuple[Any, ...], answer: Tensor) -> None:
    """On the matrix of the queries: keep its answer until the attention function has read it."""
    module.__dict__[_KEPT] = answer


def _follow(module: nn.Module, args: tuple[Any, ...]) -> None:
    """On the attention module: PEFT may have put a wrapper around the matrix since; its answer is the projection."""
    reading: Reading = module.__dict__[_READING]
    assert reading.query is not None
    matrix = module.get_submodule(reading.query.child)
    if _keep not in matrix._forward_hooks.values():
        for inside in matrix.modules():
            _remove(inside._forward_hooks, _keep)
        matrix.register_forward_hook(_keep)


def _remove(hooks: dict[int, Any], function: Any) -> None:
    for number in [number for number, hook in hooks.items() if hook is function]:
        del hooks[number]


def _kept(module: nn.Module, child: str) -> Tensor:
    answer = module.get_submodule(child).__dict__.pop(_KEPT, None)
    if answer is None:
        raise UserError(
            f"its query projection {child!r} did not run before the attention function; selective temperatures cannot "
            f"be read from this model"
        )
    return answer


def _check(reading: Reading, answer: Tensor | None, value: Tensor) -> None:
    """Once, in the probing forward: that slices of a fused answer, and repeated values, are what they are taken for."""
    own = _values(value, reading)
    each = value.shape[1] // own.shape[1]
    if each > 1 and not torch.equal(own.repeat_interleave(each, dim=1), value):
        raise UserError(f"attention gets {value.shape[1]} heads of values that are not {own.shape[1]} repeated ones")
    if reading.fused is not None and answer is not None:
        read = reading.fused.read(answer).reshape(value.shape[0], value.shape[2], -1)
        if not torch.allclose(read.float(), own.transpose(1, 2).flatten(2).float(), rtol=1e-3, atol=1e-4):
            raise UserError(
                "the slices of its fused projection do not lie as expected (the values read from it are not the values "
                "that attention gets); selective temperatures cannot be read from this model"
            )


def _values(value: Tensor, reading: Reading) -> Tensor:
    """The values [b, g, m, d] as their matrix makes them: Falcon repeats them for the queries of a group."""
    groups, head_dim = reading.values
    if value.shape[1] % groups or value.shape[3] != head_dim:
        raise UserError(
            f"attention gets values of {value.shape[1]} heads of {value.shape[3]}, expected {groups} of {head_dim} as "
            f"their matrix makes them; selective temperatures cannot be read from this model"
        )
    return value[:, :: value.shape[1] // groups]


def temperature_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The temperatures' parameters by name, for an optimizer group of their own: no weight decay (it would pull a
    sigmoid slope to 0.5), and a learning rate some ten times the others'.

    Under PEFT's `modules_to_save` these are the copies that are trained. Raises `UserError` when there are none.
    """
    found = {name: p for name, p in model.named_parameters() if NAME in name.split(".")}
    trained = {name: p for name, p in found.items() if "original_module" not in name.split(".")}
    if not trained:
        raise UserError("the model has no temperatures: patch it with a spec such as 'softmax+selective' first")
    return trained


def freeze_all_but_temperatures(model: nn.Module, dtype: torch.dtype | None = None) -> int:
    """Train the temperatures alone: every other parameter gets requires_grad=False; return the number left to train.

    dtype: cast the temperatures to it; torch.float32 beside bf16 weights, whose steps are too coarse for values that
    start at 0. Raises `UserError` when there are none.
    """
    temperatures = temperature_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in temperatures.values():
        parameter.requires_grad_(True)
        if dtype is not None:
            parameter.data = parameter.data.to(dtype)
    return sum(p.numel() for p in temperatures.values())
