"""Saving and loading patched models.

    model.save_pretrained("folder")          # as ever, on a patched model
    model = ch.hf.load("folder")             # patched as it was

A patch is not a weight. So a patched model carries a small buffer, `clearhead_patched_with_<spec>`, among its weights,
and its `save_pretrained` writes `clearhead.json` beside `config.json`. `config.json` itself stays the plain model's: a
folder that is opened without clearhead loads as that model, and transformers' report of unexpected weights names the
buffer and the temperatures, which is how a reader learns what was lost.

Loading lets transformers read all weights, the temperatures among them, into a model that has places for them, so that
dtype, device_map, shards and renamed weights are its business as for any model; then the model is patched anew, with
the probe that checks every layer under the transformers that is installed now.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

import clearhead
from clearhead.attention.spec import AttentionSpec, Selective
from clearhead.errors import UserError
from clearhead.hf import temperatures
from clearhead.hf.options import TemperatureOptions

FILE = "clearhead.json"
MARKER = "clearhead_patched_with"
FORMAT = 1


@dataclass(frozen=True)
class Record:
    """What `clearhead.json` says."""

    spec: str
    layers: tuple[str, ...]
    """Paths of the attention modules."""
    temperature: dict[str, Any] | None
    """`TemperatureOptions` as plain values."""
    architecture: str
    """Name of the model's class."""
    transformers: str
    clearhead: str
    format: int = FORMAT

    @property
    def options(self) -> TemperatureOptions | None:
        """The options as they were."""
        return None if self.temperature is None else TemperatureOptions.from_dict(self.temperature)


def remember(
    model: nn.Module, spec: AttentionSpec | str, layers: Iterable[str], options: TemperatureOptions | None
) -> None:
    """Called by `patch`: add the marker, and let `save_pretrained` write `clearhead.json`."""
    import transformers

    spec = AttentionSpec.parse(spec)
    record = Record(
        spec=str(spec),
        layers=tuple(layers),
        temperature=(options or TemperatureOptions()).to_dict() if isinstance(spec.temperature, Selective) else None,
        architecture=type(model).__name__,
        transformers=transformers.__version__,
        clearhead=clearhead.__version__,
    )
    _mark(model, spec)
    model.__dict__["_clearhead_record"] = record
    model.__dict__["save_pretrained"] = partial(_save_pretrained, model)  # a bound method would not pickle


def forget(model: nn.Module) -> None:
    """Called by `unpatch`: take the marker away; `save_pretrained` is the class's own again."""
    model.__dict__.pop("_clearhead_record", None)
    model.__dict__.pop("save_pretrained", None)
    for name in [name for name in model._buffers if name.startswith(MARKER)]:
        delattr(model, name)


def load(
    folder: str | Path,
    *,
    model_class: type | None = None,
    probe: Mapping[str, Any] | None = None,
    **keywords: Any,
) -> Any:
    """The patched model in `folder`, as `model.save_pretrained(folder)` left it.

    Args:
        folder: holds `config.json`, weights and `clearhead.json`.
        model_class: the class to load; None = the one that was saved. A class that transformers does not have must be
            given.
        probe: inputs for the probing forward, as `patch` takes them.
        keywords: for `from_pretrained` (dtype, device_map, ...).

    Raises `UserError`, one line, when the folder was not saved from a patched model, when its temperatures are not
    those that it names, and when it was saved under another major version of transformers. Another minor version is a
    warning: the probe looks at every layer again.
    """
    record = read(Path(folder))
    _check_version(record, Path(folder))
    model_class = _class_of(record, Path(folder)) if model_class is None else model_class
    keywords.pop("output_loading_info", None)
    model, found = _ready(model_class, record).from_pretrained(folder, output_loading_info=True, **keywords)
    model.__class__ = model_class
    _check_weights(record, Path(folder), found)

    from clearhead.hf.patching import patch

    held = {name: p.detach() for name, p in _temperatures_of(model).items()}
    temperatures.remove(model)
    forget(model)
    patch(model, record.spec, temperature=record.options, probe=probe)
    places = _temperatures_of(model)
    if places.keys() != held.keys():
        odd = sorted(places.keys() ^ held.keys())[0]
        raise UserError(f"{folder}: the model's temperatures are not those that were saved; the first to differ: {odd}")
    with torch.no_grad():
        for name, parameter in places.items():
            parameter.copy_(held[name])
    return model


def read(folder: Path) -> Record:
    """The record of a folder; raises `UserError` where there is none or it cannot be understood."""
    path = folder / FILE
    if not path.is_file():
        raise UserError(
            f"{folder}: there is no {FILE}, so it was not saved from a patched model; load it with from_pretrained, "
            f"then clearhead.hf.patch(model, spec)"
        )
    try:
        values = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(values, Mapping) or values.get("format") != FORMAT:
        made = values.get("clearhead", "unknown") if isinstance(values, Mapping) else "unknown"
        raise UserError(f"{path}: expected format {FORMAT}; it was written by clearhead {made}, open it with that")
    names = {field.name for field in fields(Record)}
    if set(values) != names:
        raise UserError(f"{path}: expected the fields {', '.join(sorted(names))}, got {', '.join(sorted(values))}")
    return Record(**{**values, "layers": tuple(values["layers"])})


def _save_pretrained(self: Any, save_directory: str | Path, is_main_process: bool = True, **keywords: Any) -> None:
    """`PreTrainedModel.save_pretrained`, and `clearhead.json` beside the config."""
    if keywords.get("push_to_hub"):
        raise UserError(
            f"save_pretrained(push_to_hub=True) would leave {FILE} behind; save_pretrained first, then "
            f"model.push_to_hub(repo_id)"
        )
    type(self).save_pretrained(self, save_directory, is_main_process=is_main_process, **keywords)
    if is_main_process:
        record: Record = self.__dict__["_clearhead_record"]
        (Path(save_directory) / FILE).write_text(json.dumps(asdict(record), indent=2) + "\n")


def _mark(model: nn.Module, spec: AttentionSpec) -> None:
    # A buffer's name takes any character but the dot. One byte, so that no cast of the model touches it.
    model.register_buffer(f"{MARKER}_{spec.text.replace('.', '_')}", torch.ones(1, dtype=torch.uint8))


def _ready(model_class: Any, record: Record) -> Any:
    """The class, with places for what a patched model's folder holds beside its own weights."""

    def init(self: Any, *arguments: Any, **keywords: Any) -> None:
        model_class.__init__(self, *arguments, **keywords)
        _mark(self, AttentionSpec.parse(record.spec))
        temperatures.install(self, record.layers, record.spec, record.options)

    body = {"__init__": init, "__module__": model_class.__module__, "__qualname__": model_class.__qualname__}
    return type(model_class.__name__, (model_class,), body)


def _class_of(record: Record, folder: Path) -> Any:
    import transformers

    found = getattr(transformers, record.architecture, None)
    if found is None:
        raise UserError(
            f"{folder}: transformers {transformers.__version__} has no class {record.architecture}; give it: "
            f"clearhead.hf.load(folder, model_class={record.architecture})"
        )
    return found


def _check_version(record: Record, folder: Path) -> None:
    import transformers

    saved, here = record.transformers.split("."), transformers.__version__.split(".")
    if saved[0] != here[0]:
        raise UserError(
            f"{folder}: patched under transformers {record.transformers}, this is {transformers.__version__}; install "
            f"that version, or load the plain model with from_pretrained and patch it anew"
        )
    if saved[1] != here[1]:
        warnings.warn(
            f"{folder}: patched under transformers {record.transformers}, this is {transformers.__version__}; every "
            f"layer is checked again",
            stacklevel=3,
        )


def _check_weights(record: Record, folder: Path, found: Mapping[str, Any]) -> None:
    ours = (MARKER, temperatures.NAME)
    lost = sorted(name for name in found["missing_keys"] if any(part.startswith(ours) for part in name.split(".")))
    if lost:
        raise UserError(
            f"{folder}: {FILE} says {record.spec!r}, but the weights have no {lost[0]}; the plain model was saved over "
            f"the patched one: remove {FILE}, or save the patched model again"
        )


def _temperatures_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if temperatures.NAME in name.split(".")}
