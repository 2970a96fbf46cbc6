"""Names under which transformers knows our attentions, and setting them on a model and its sub-models.

A name says the spec in letters, digits and underscores: one that contains `flash`, `sdpa`, `flex` or a slash means
something else to transformers.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from clearhead.attention.spec import AttentionSpec
from clearhead.errors import UserError
from clearhead.hf.report import PatchReport

PREFIX = "clearhead_"
STATE = "_clearhead_patch"
OLDEST, NEWEST = (5, 17), (5, 23)
"""Versions of transformers that the tests run on; a newer one warns, an older one is refused."""
_FORBIDDEN = ("flash", "sdpa", "flex", "paged")

NAMES: dict[str, str] = {}
"""Registered name -> spec."""


@dataclass
class PatchState:
    """All that a patch did to a model, kept as one attribute of it; `unpatch` takes it back."""

    spec: str
    name: str
    library: str
    options: Any = None
    implementations: dict[str, Any] = field(default_factory=dict)
    """What each config said before: by path, e.g. "" or "text_config"."""
    modules: tuple[str, ...] = ()
    """Paths of the modules that carry a `Layer`."""
    watched: tuple[Any, ...] = ()
    """The configs that name the patch; another attention set over it is an error at the next forward."""
    report: PatchReport | None = None


def transformers_or_error() -> Any:
    """The library, in a version that is known; `UserError` with one line otherwise."""
    try:
        import transformers
    except ImportError:
        raise UserError("transformers is not installed: pip install 'clearhead[hf]'") from None
    found = re.match(r"(\d+)\.(\d+)", transformers.__version__)
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST:
        raise UserError(
            f"transformers {transformers.__version__} is too old to be patched (its mask builder passes other things); "
            f"install {OLDEST[0]}.{OLDEST[1]} to {NEWEST[0]}.{NEWEST[1]}: pip install 'clearhead[hf]'"
        )
    return transformers


def too_new(version: str) -> str | None:
    """A note for a version past those that were tested."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) <= NEWEST:
        return None
    return (
        f"transformers {version} is newer than {NEWEST[0]}.{NEWEST[1]}, the last that was tested; the probe ran, "
        f"compare an unpatched and a 'softmax'-patched output before you rely on it"
    )


def name_of(spec: AttentionSpec) -> str:
    """`clearhead_` and the spec; what letters cannot say becomes a checksum of the text."""
    plain = re.sub(r"[^a-z0-9_]+", "_", spec.text.lower()).strip("_")
    if any(word in plain for word in _FORBIDDEN):
        plain = "attention"
    name = PREFIX + plain
    return name if plain == spec.text else f"{name}_{zlib.crc32(spec.text.encode()):08x}"


def register(spec: AttentionSpec) -> str:
    """Make the spec known to transformers: attention *and* mask function. Returns its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from clearhead.hf.function import make_function
    from clearhead.hf.masks import learn_kinds, mask_function

    name = name_of(spec)
    learn_kinds()
    if name not in NAMES:
        AttentionInterface.register(name, make_function(spec))
        AttentionMaskInterface.register(name, mask_function)  # without it, masks are None and nothing says so
        NAMES[name] = spec.text
    return name


# ---- on a model -----------------------------------------------------------------------------------------------------


def configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Every config that a layer might read, with a path: those of the sub-models, and those inside a config."""
    from transformers import PreTrainedModel

    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            yield from _nested(module.config, path, seen)


def _nested(config: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(config) in seen or not hasattr(config, "_attn_implementation_internal"):
        return
    seen.add(id(config))
    yield path, config
    for key in getattr(config, "sub_configs", {}) or {}:
        yield from _nested(getattr(config, key, None), f"{path}:{key}", seen)


def read_back(model: nn.Module) -> dict[str, Any]:
    """What every config says now, for `put_back`."""
    return {path: config._attn_implementation_internal for path, config in configs(model)}


def set_everywhere(model: Any, name: str) -> None:
    """Set the attention on the model and its sub-models.

    `set_attn_implementation` of older versions passes over a sub-model whose config is a copy of the model's (T5's
    encoder and decoder in 5.17), so every config of a class that takes an attention is set here once more.
    """
    import transformers

    from clearhead.hf.replace.swap import tell

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # what it would warn of, the probe turns into an error
    try:
        model.set_attn_implementation(name)
        for module in model.modules():
            if isinstance(module, transformers.PreTrainedModel) and module._can_set_attn_implementation():
                module.config._attn_implementation_internal = name
        tell(model, name)
    finally:
        transformers.logging.set_verbosity(level)


def put_back(model: nn.Module, before: dict[str, Any]) -> None:
    """Set every config to what `read_back` found."""
    for path, config in configs(model):
        if path in before:
            config._attn_implementation_internal = before[path]
