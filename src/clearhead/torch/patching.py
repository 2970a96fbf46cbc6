"""`patch` and `unpatch`: models that hold torch's or timm's attention modules.

A patched module keeps its parameters, buffers, hooks and place; only its class changes, and `unpatch` gives that back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
import torch.nn as nn

from clearhead.anatomy import hugging_face
from clearhead.anatomy.attention import find_attentions
from clearhead.anatomy.find import unwrap
from clearhead.anatomy.rules import Rules
from clearhead.anatomy.search import below
from clearhead.attention.spec import AttentionSpec, Full, Performer, Selective
from clearhead.errors import UserError
from clearhead.hf.options import TemperatureOptions
from clearhead.hf.report import LayerReport, PatchReport
from clearhead.torch.mixing import Patched, add_parts, counting, for_role, remove_parts
from clearhead.torch.multihead import PatchedMultiheadAttention, refuse_multihead
from clearhead.torch.probe import probe_layers, probe_model
from clearhead.torch.vision import TimmAttention, is_timm_attention, refuse_timm

KEPT = "clearhead_patch"
NESTED = "clearhead_use_nested_tensor"


@dataclass(frozen=True)
class Kind:
    """A class of attention that can be patched: how it is known, what it becomes, and what it refuses."""

    fits: Callable[[nn.Module], bool]
    becomes: type[nn.Module]
    refuse: Callable[[Patched, str, Any], None]
    matrix: Callable[[Any], torch.Tensor]
    keywords: tuple[str, ...]


KINDS = (
    Kind(
        lambda module: type(module) is nn.MultiheadAttention,
        PatchedMultiheadAttention,
        refuse_multihead,
        lambda module: module.out_proj.weight,
        ("attn_mask", "key_padding_mask", "is_causal", "need_weights"),
    ),
    Kind(is_timm_attention, TimmAttention, refuse_timm, lambda module: module.qkv.weight, ("attn_mask", "is_causal")),
)


def patch(
    module: nn.Module,
    spec: AttentionSpec | str,
    *,
    temperature: TemperatureOptions | Mapping[str, Any] | None = None,
    probe: Sequence[Any] | Mapping[str, Any] | None = None,
    skip: Iterable[str] = (),
) -> PatchReport:
    """Let every attention of a plain torch or timm model compute by `spec`, in place; `print(report)` tells what was
    reached.

    Patched: `nn.MultiheadAttention`, alone or inside `nn.Transformer*` and your own modules, and timm's `Attention`.
    Parameters keep their names. In `nn.TransformerDecoderLayer.multihead_attn` (cross attention) the spec's pattern is
    left out. `+selective` and `+learned` add a submodule `clearhead_temperatures` to each layer, with no effect at the
    start.

    Args:
        temperature: of `+selective`: `ch.hf.TemperatureOptions`, or a dict of its fields.
        probe: arguments (a tuple, or a dict by name) of one forward of `module`, to count that each patched layer is
            really called. Layers of `nn.Transformer*` are probed one by one without it.
        skip: paths of attentions to leave as they are, `*` allowed: `skip=("attn_pool", "head.*")`.

    Raises `UserError`, one line, and changes nothing: an unknown spec; a model patched before; a Hugging Face model
    (`ch.hf.patch`); a model without an attention that is known here; an attention of another class beside those that
    are known; attention dropout that the mechanism refuses; a layer that the probe did not call, and a module that it
    saw calling scaled_dot_product_attention by itself.
    """
    parsed = AttentionSpec.parse(spec)
    model = unwrap(module)
    if isinstance(module, nn.parallel.DistributedDataParallel) and parsed.temperature is not None:
        raise UserError("DistributedDataParallel would not average the gradients of new temperatures; patch, then wrap")
    left_out = (skip,) if isinstance(skip, str) else tuple(skip)
    if temperature is not None and not isinstance(parsed.temperature, Selective):
        raise UserError(f"temperature: options of +selective, which attention {parsed.text!r} has not; add it")
    found = _find(model, left_out)
    roles = _roles(model)
    plans: list[tuple[str, nn.Module, Kind, Patched]] = []
    for name, layer, kind in found:
        role = roles.get(layer, "bidirectional")
        patched = Patched(for_role(parsed, role), role, type(layer))
        kind.refuse(patched, name or type(layer).__name__, layer)
        plans.append((name, layer, kind, patched))
    before = sum(p.numel() for p in model.parameters())
    try:
        for place, (_, layer, kind, patched) in enumerate(plans):
            add_parts(layer, patched, kind.matrix(layer), place=place, options=temperature)
    except BaseException:
        for _, layer, _, _ in plans:
            remove_parts(layer)
        raise
    for _, layer, kind, patched in plans:
        layer.__dict__[KEPT] = patched
        layer.__class__ = kind.becomes
    for encoder in model.modules():
        if isinstance(encoder, nn.TransformerEncoder) and hasattr(encoder, "use_nested_tensor"):
            encoder.__dict__[NESTED] = encoder.use_nested_tensor
            encoder.use_nested_tensor = False  # nested tensors are made for the fast path alone
    try:
        calls, unprobed, callers = _probe(model, [layer for _, layer, _, _ in plans], probe)
        silent = [name for name, layer, _, _ in plans if not calls.get(layer) and layer not in unprobed]
        if silent:
            raise UserError(
                f"{type(model).__name__}: the probe never called {', '.join(silent)}; something computes with its "
                "weights in another way, so the patch would not act; call clearhead.functional there (see "
                "docs/adopt-torch.md), or leave it out with skip"
            )
        if callers and not left_out:
            raise UserError(
                f"{type(model).__name__}: the probe saw scaled_dot_product_attention called in {', '.join(callers)}, "
                "which would stay softmax; call clearhead.functional there, or leave it out with skip"
            )
    except BaseException:
        unpatch(model)
        raise
    added = sum(p.numel() for p in model.parameters()) - before
    layers = tuple(
        LayerReport(name or "(the module itself)", patched.role, calls.get(layer, 0), kind.keywords)
        for name, layer, kind, patched in plans
    )
    notes = _notes(parsed, layers, [name for name, layer, _, _ in plans if layer in unprobed], left_out, callers)
    return PatchReport(
        parsed.text, "clearhead.torch", layers, f"torch {torch.__version__}", added, before + added, notes
    )


def unpatch(module: nn.Module) -> None:
    """Give every layer its class back and drop added temperatures: outputs are those of before, bit by bit.

    Raises `UserError` when nothing is patched. A layer that was built by `timm_attention` has no class to go back to
    and stays.
    """
    model = unwrap(module)
    patched = [m for m in model.modules() if m.__dict__.get(KEPT) is not None and m.__dict__[KEPT].original is not None]
    if not patched:
        raise UserError(f"{type(model).__name__} is not patched; ch.torch.patch(model, spec) does that")
    for layer in patched:
        kept = layer.__dict__.pop(KEPT)
        remove_parts(layer)
        layer.__class__ = kept.original
    for encoder in model.modules():
        if NESTED in encoder.__dict__:
            encoder.use_nested_tensor = encoder.__dict__.pop(NESTED)


# ---- what to patch ----


def _find(model: nn.Module, skip: tuple[str, ...]) -> list[tuple[str, nn.Module, Kind]]:
    if hugging_face.recognises(model):
        raise UserError(f"{type(model).__name__} is a Hugging Face model; use ch.hf.patch(model, spec)")
    found: list[tuple[str, nn.Module, Kind]] = []
    for name, module in model.named_modules():
        kept = module.__dict__.get(KEPT)
        if kept is not None:
            how = "ch.torch.unpatch(model) first" if kept.original else "build the model with another attn_layer"
            raise UserError(f"{name or type(model).__name__} attends by {kept.spec.text!r} already; {how}")
        kind = next((kind for kind in KINDS if kind.fits(module)), None)
        if kind is not None and not any(fnmatch(name, pattern) for pattern in skip):
            found.append((name, module, kind))
    taken = [name for name, _, _ in found]
    others = [
        f"{name or '(the module itself)'} ({kind})"
        for name, kind in _others(model, taken)
        if not any(fnmatch(name, pattern) or below(name, pattern) for pattern in skip)
    ]
    if not found:
        what = f"; its attentions are of other classes: {', '.join(others[:3])}" if others else ""
        raise UserError(
            f"{type(model).__name__} holds neither nn.MultiheadAttention nor timm's Attention{what}; in your own "
            "module call clearhead.functional instead of scaled_dot_product_attention (docs/adopt-torch.md)"
        )
    if others:
        more = f" and {len(others) - 4} more" if len(others) > 4 else ""
        raise UserError(
            f"{type(model).__name__}: these attentions are of classes that cannot be patched, and would stay as they "
            f"are: {', '.join(others[:4])}{more}; name them in skip=(...) to patch the rest, or call "
            "clearhead.functional in them"
        )
    return found


def _others(model: nn.Module, taken: list[str]) -> list[tuple[str, str]]:
    """Attentions that are not in `taken`: by their matrices, or by the name of their class when it has parameters."""
    others: dict[str, str] = {}

    def known(name: str) -> bool:
        return any(below(name, path) or below(path, name) for path in taken)

    for part in find_attentions(model, Rules(model)):
        name = part.query.path
        if not any(below(name, path) for path in taken):
            holder = name if isinstance(part.module, nn.MultiheadAttention) else name.rpartition(".")[0]
            others[holder] = type(model.get_submodule(holder)).__qualname__
    for name, module in model.named_modules():
        kind = type(module).__name__.lower()
        named = "attention" in kind or "attn" in kind
        if named and not known(name) and any(True for _ in module.parameters()):
            inside = any(below(other, name) or below(name, other) for other in others)
            if not inside:
                others[name] = type(module).__qualname__
    return list(others.items())


def _roles(model: nn.Module) -> dict[nn.Module, str]:
    roles: dict[nn.Module, str] = {}
    for module in model.modules():
        if isinstance(module, nn.TransformerDecoderLayer):
            roles[module.self_attn], roles[module.multihead_attn] = "causal", "cross"
        elif isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
            roles.setdefault(module, "cross")  # keys or values of another width: of another text
    return roles


# ---- seeing that it acts ----


def _probe(
    model: nn.Module, layers: list[nn.Module], probe: Sequence[Any] | Mapping[str, Any] | None
) -> tuple[dict[nn.Module, int], set[nn.Module], tuple[str, ...]]:
    """Calls by layer, the layers that nothing probed, and the classes that attend by themselves."""
    with counting() as calls:
        if probe is not None:
            callers = probe_model(model, probe)
            return {layer: count // 2 for layer, count in calls.items()}, set(), callers
        reached = probe_layers(model)
    return calls, {layer for layer in layers if layer not in reached}, ()


def _notes(
    spec: AttentionSpec,
    layers: tuple[LayerReport, ...],
    unprobed: list[str],
    skip: tuple[str, ...],
    callers: tuple[str, ...],
) -> tuple[str, ...]:
    notes = []
    if unprobed:
        shown = ", ".join(name or "the module itself" for name in unprobed[:3]) + (", ..." if len(unprobed) > 3 else "")
        notes.append(f"not probed: {shown}; pass probe=(inputs,) to see that the model calls them")
    if not isinstance(spec.pattern, Full) and any(layer.role == "cross" for layer in layers):
        notes.append(f"{spec.pattern.name} is left out of cross attention: it counts distances within one text")
    if isinstance(spec.weights, Performer):
        notes.append("random features are drawn once from the spec's seed, others for each layer; redraw does not act")
    if skip:
        notes.append(f"left as they are: {', '.join(skip)}")
    if callers:
        notes.append(f"call scaled_dot_product_attention as before: {', '.join(callers)}")
    return tuple(notes)
