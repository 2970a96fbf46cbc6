"""`find`, `install`, `tell`, `remove`: swapping the classes of a built model's attention modules in place.

transformers' own `register_patch_mapping` replaces classes while a model is being built, for the whole process; a model
that exists already, with its weights, needs the swap. Parameters, buffers, names and hooks stay where they are: only
the class of the module object changes, so checkpoints, PEFT and `unpatch` see the same model.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import torch.nn as nn

from clearhead.attention.spec import AttentionSpec
from clearhead.errors import UserError
from clearhead.hf.replace.table import REFUSED, REPLACED

UNDO, CONFIG = "_clearhead_replaced", "clearhead_config"
_PREFIX = "transformers.models."


def find(model: nn.Module, spec: AttentionSpec | str = "softmax") -> dict[str, type[nn.Module]]:
    """The modules of `model` whose class does not use the attention interface, and the class that stands in for each.

    Empty for a model that uses the interface. Raises `UserError` for an architecture that nothing can stand in for, or
    not under this spec, with the reason.
    """
    parsed = AttentionSpec.parse(spec)
    found: dict[str, type[nn.Module]] = {}
    seen: set[str] = set()
    for name, module in model.named_modules():
        folder = _folder(module)
        if folder in REFUSED:
            raise UserError(f"{folder} cannot be patched: {REFUSED[folder]}")
        if folder not in REPLACED:
            continue
        file: Any = importlib.import_module(f"clearhead.hf.replace.{folder}")
        if folder not in seen:
            seen.add(folder)
            refuse = getattr(file, "refuse", None)
            if refuse is not None:
                refuse(model, parsed)
        stand_in = file.CLASSES.get(type(module).__name__)
        if stand_in is not None:
            found[name] = stand_in
    return found


def install(model: nn.Module, found: Mapping[str, type[nn.Module]]) -> None:
    """Swap the classes that `find` found; `tell` then says which attention they call."""
    if not found:
        return
    if UNDO in model.__dict__:
        raise UserError("this model's attention classes are replaced already; unpatch it first")
    undo: list[tuple[Any, str, Any]] = []
    model.__dict__[UNDO] = undo

    def change(owner: Any, attribute: str, value: Any) -> None:
        undo.append((owner, attribute, getattr(owner, attribute, None)))
        setattr(owner, attribute, value)

    folders: dict[str, None] = {}
    for name, stand_in in found.items():
        module = model.get_submodule(name)
        folders[_folder(module)] = None
        undo.append((module, "__class__", type(module)))
        module.__class__ = stand_in
        change(module, CONFIG, _config_above(model, name))
    for folder in folders:
        prepare = getattr(importlib.import_module(f"clearhead.hf.replace.{folder}"), "prepare", None)
        if prepare is not None:
            prepare(model, change)


def tell(model: nn.Module, implementation: str) -> None:
    """Set the attention, and with it the mask function, on the configs that replaced modules read.

    `set_attn_implementation` leaves a model alone that does not use the interface.
    """
    for owner, attribute, _ in model.__dict__.get(UNDO, ()):
        if attribute == CONFIG:
            owner.__dict__[CONFIG]._attn_implementation_internal = implementation


def remove(model: nn.Module) -> None:
    """Give back what `install` changed (not what `tell` set); nothing happens to a model without replacements."""
    for owner, attribute, value in reversed(model.__dict__.pop(UNDO, [])):
        if attribute == CONFIG:
            for kept in (CONFIG, "clearhead_weights"):
                owner.__dict__.pop(kept, None)
        else:
            setattr(owner, attribute, value)


def _config_above(model: nn.Module, name: str) -> Any:
    """The config of the innermost model of transformers that holds the module: the one that its masks are made by."""
    from transformers import PreTrainedModel

    while name:
        name = name.rpartition(".")[0]
        above = model.get_submodule(name) if name else model
        if isinstance(above, PreTrainedModel):
            return above.config
    raise UserError(f"{type(model).__name__}: expected a model of transformers")


def _folder(module: nn.Module) -> str:
    """The folder of transformers that the module's class was written in; empty for any other class.

    A replaced module keeps the folder of the class that it stands in for.
    """
    for kind in type(module).__mro__:
        if kind.__module__.startswith(_PREFIX):
            return kind.__module__.removeprefix(_PREFIX).partition(".")[0]
        if not kind.__module__.startswith("clearhead.hf.replace."):
            return ""
    return ""
