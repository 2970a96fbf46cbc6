"""`patch` and `unpatch`: another attention for a Hugging Face model, and back."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from clearhead.anatomy.find import unwrap
from clearhead.attention.spec import AttentionSpec, Full, Laser, Performer
from clearhead.errors import UserError
from clearhead.hf import probe as probes
from clearhead.hf import store, temperatures
from clearhead.hf.function import LAYER, Layer, refuse_empty
from clearhead.hf.register import (
    STATE,
    PatchState,
    configs,
    put_back,
    read_back,
    register,
    set_everywhere,
    too_new,
    transformers_or_error,
)
from clearhead.hf.replace.swap import find, install, remove
from clearhead.hf.report import LayerReport, PatchReport

if TYPE_CHECKING:
    from clearhead.hf.temperatures import TemperatureOptions


def patch(
    model: nn.Module,
    spec: AttentionSpec | str,
    *,
    temperature: TemperatureOptions | None = None,
    probe: Mapping[str, Any] | None = None,
) -> PatchReport:
    """Give every attention of a Hugging Face model the attention `spec`, in place; `unpatch` takes it back.

    The attention and its mask function are registered with transformers and set on the model and its sub-models. Then
    one forward on made-up inputs (`probe`: a batch of yours instead, as keywords of the model's forward) counts the
    calls of each layer. Cross attention keeps its full view where `spec` has a pattern.

    Args:
        model: a `PreTrainedModel`; wrappers of DDP and torch.compile are looked through.
        spec: as text ("laser", "softmax+window:256", "bigbird") or an `AttentionSpec`.
        temperature: how `+selective` and `+learned` are made.
        probe: inputs for the probing forward, where the made-up ones do not fit the model.

    Raises `UserError`, one line, and leaves the model as it was: when transformers is missing or too old, the model is
    patched already, a layer of attention does not call what was set, a layer passes a keyword that is not handled, or
    the spec cannot stand in (LASER and Performer with attention dropout, LASER with sinks, ...).
    """
    spec = AttentionSpec.parse(spec)
    transformers = transformers_or_error()
    model = unwrap(model)
    _check(model, transformers)
    note = too_new(transformers.__version__)
    if note is not None:
        warnings.warn(note, stacklevel=2)
    state = PatchState(spec.text, "", transformers.__version__, temperature)
    setattr(model, STATE, state)
    parameters = sum(p.numel() for p in model.parameters())
    try:
        runs: Runs = [(model, dict(probe) if probe is not None else probes.make_batch(model))]
        install(model, find(model, spec))
        called = _discover(model, runs, state, made_up=probe is None)
        layers = _label(model, called, state)
        _refuse_dropout(model, spec, runs, state)
        if spec.temperature is not None:
            temperatures.install(model, {name: model.get_submodule(name) for name in state.modules}, spec, temperature)
        state.name = register(spec)
        set_everywhere(model, state.name)
        _probe(runs)
    except BaseException:
        _take_back(model, state)
        raise
    model.register_forward_hook(refuse_empty)
    state.watched = tuple(c for _, c in configs(model) if c._attn_implementation_internal == state.name)
    model.register_forward_pre_hook(refuse_another)
    total = sum(p.numel() for p in model.parameters())
    notes = [] if note is None else [note]
    if not isinstance(spec.pattern, Full) and any(layer.role == "cross" for layer in layers):
        notes.append(f"cross attention sees all keys: {spec.pattern} speaks of positions in one sequence")
    state.report = PatchReport(
        spec=spec.text,
        implementation=state.name,
        layers=layers,
        library=transformers.__version__,
        added_parameters=total - parameters,
        parameters=total,
        notes=tuple(notes),
    )
    store.remember(model, spec, state.modules, temperature)
    return state.report


def unpatch(model: nn.Module) -> None:
    """Take a patch back: the model's own attention, bit for bit, and no trace of the patch on the model.

    Raises `UserError` when the model is not patched.
    """
    model = unwrap(model)
    state = getattr(model, STATE, None)
    if state is None:
        raise UserError(f"{type(model).__name__} is not patched")
    _take_back(model, state)


def _take_back(model: nn.Module, state: PatchState) -> None:
    put_back(model, state.implementations)
    remove(model)
    temperatures.remove(model)
    store.forget(model)
    _unlabel(model, state)
    for hooks, own in ((model._forward_hooks, refuse_empty), (model._forward_pre_hooks, refuse_another)):
        for key in [key for key, hook in hooks.items() if hook is own]:
            del hooks[key]
    if hasattr(model, STATE):
        delattr(model, STATE)


def refuse_another(model: nn.Module, inputs: Any) -> None:
    """A hook before the model's forward: whoever sets another attention over a patch is told, once and for all."""
    state = model.__dict__.get(STATE)
    if torch.compiler.is_compiling() or state is None:
        return
    for config in state.watched:
        if config._attn_implementation_internal != state.name:
            raise UserError(
                f"the attention of {type(model).__name__} was set to {config._attn_implementation_internal!r} after it "
                f"was patched with {state.spec!r}; call clearhead.hf.unpatch(model) first, then set it"
            )


def _check(model: nn.Module, transformers: Any) -> None:
    if not isinstance(model, transformers.PreTrainedModel):
        raise UserError(
            f"expected a model of transformers, got {type(model).__name__}; for timm and plain torch modules use "
            f"clearhead.torch.patch"
        )
    if getattr(model, STATE, None) is not None:
        raise UserError(
            f"{type(model).__name__} is patched with {getattr(model, STATE).spec!r} already; unpatch(model) first"
        )
    for path, module in model.named_modules():
        if path and getattr(module, STATE, None) is not None:
            raise UserError(f"{path} is patched with {getattr(module, STATE).spec!r} already; unpatch it first")
        if LAYER in vars(module):
            raise UserError(f"{path} belongs to a model that is patched already; unpatch that model first")
    if any(p.is_meta for p in model.parameters()):
        raise UserError(f"{type(model).__name__} is on the meta device; load its weights before it is patched")


Runs = list[tuple[nn.Module, Mapping[str, Any]]]
"""The probing forwards: of the model, and of sub-models (a picture tower, say) that its inputs do not reach."""


def _discover(model: Any, runs: Runs, state: PatchState, *, made_up: bool) -> dict[nn.Module, probes.Calls]:
    """Which modules call: a forward under plain softmax, which nothing refuses, so that every layer is reached.

    Sub-models that made-up inputs of the whole did not reach are run alone, and join `runs`.
    """
    expected = probes.attention_modules(model)
    state.implementations = read_back(model)
    set_everywhere(model, register(AttentionSpec()))
    state.modules = tuple(expected)
    for path, module in expected.items():
        setattr(module, LAYER, Layer(path, ""))  # a refusal of the first call needs the name already
    called = _probe(runs)
    missed = probes.missed(model, expected, called)
    for part in probes.parts_that_hold(model, missed) if made_up and called else ():
        try:
            run = (part, probes.make_batch(part))
            called.update(probes.run(*run))
        except Exception:  # no inputs are known for it: what stays missed is an error below
            continue
        runs.append(run)
        missed = probes.missed(model, expected, called)
    if not expected and not called:
        raise UserError(f"{type(model).__name__}: no attention was found in it, and none was called")
    if missed:
        first = missed[0]
        others = f" (and {len(missed) - 1} more)" if len(missed) > 1 else ""
        raise UserError(
            f"{first}{others}, a {type(expected[first]).__name__}, does not call the attention that was set: "
            f"{_why(model, bool(called))}; nothing was changed"
        )
    return called


def _why(model: Any, some: bool) -> str:
    if not some and not getattr(type(model), "_supports_attention_backend", False):
        return f"{type(model).__name__} does not use transformers' attention interface"
    if not some:
        return f"no layer of {type(model).__name__} did in the probing forward"
    return "other layers do, so the probing inputs did not reach it (pass probe=), or it has an attention of its own"


def _probe(runs: Runs, training: Collection[nn.Module] = ()) -> dict[nn.Module, probes.Calls]:
    called: dict[nn.Module, probes.Calls] = {}
    for model, batch in runs:
        try:
            called.update(probes.run(model, batch, training))
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"the probing forward of {type(model).__name__} failed ({type(error).__name__}: {_line(error)}); if "
                f"its inputs were wrong, pass one batch of yours as probe="
            ) from error
    return called


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 200 else text[:200] + "..."


def _label(model: nn.Module, called: dict[nn.Module, probes.Calls], state: PatchState) -> tuple[LayerReport, ...]:
    layers = []
    _unlabel(model, state)
    for name, module in model.named_modules():
        if module in called:
            calls = called[module]
            role = probes.role_of(name, module, calls)
            setattr(module, LAYER, Layer(name, role))
            layers.append(LayerReport(name, role, calls.count, calls.keywords))
    state.modules = tuple(layer.name for layer in layers)
    return tuple(layers)


def _unlabel(model: nn.Module, state: PatchState) -> None:
    for name in state.modules:
        model.get_submodule(name).__dict__.pop(LAYER, None)
    state.modules = ()


def _refuse_dropout(model: Any, spec: AttentionSpec, runs: Runs, state: PatchState) -> None:
    """LASER and Performer refuse dropout on the weights; better now than at the first step of training."""
    if not isinstance(spec.read, Laser) and not isinstance(spec.weights, Performer):
        return
    training = {model.get_submodule(name) for name in state.modules}
    dropped = {module: calls.dropout for module, calls in _probe(runs, training).items() if calls.dropout > 0.0}
    if not dropped:
        return
    first = next(name for name in state.modules if model.get_submodule(name) in dropped)
    value = dropped[model.get_submodule(first)]
    options = sorted(name for name, found in model.config.to_dict().items() if name in _DROPOUTS and found == value)
    raise UserError(
        f"attention {spec.text!r} refuses dropout on attention weights, and {first} trains with {value}; load the "
        f"model with {options[0] if options else 'attention_dropout'}=0.0"
    )


_DROPOUTS = (
    "attention_dropout", "attention_dropout_prob", "attention_probs_dropout_prob", "attn_dropout", "attn_pdrop",
    "dropout_rate",
)  # fmt: skip
