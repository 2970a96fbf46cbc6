"""Arms: a name and what it changes. Reading them, applying them, and saying exactly how two of them differ.

Imports no torch: a mistake in an arm is reported before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from clearhead.attention.spec import AttentionSpec
from clearhead.errors import UserError, nearest
from clearhead.train.config import DECODERS, RunConfig

FIXED_KEYS: dict[str, str] = {
    "model.source": "every arm begins from the same model",
    "model.base": "every arm begins from the same model",
    "data.source": "every arm is judged on the same text",
    "data.val_fraction": "every arm is judged on the same split",
    "data.test_fraction": "every arm is judged on the same split",
    "data.split_seed": "every arm is judged on the same split",
    "data.max_bytes": "every arm is judged on the same text",
    "train.seed": "the seeds belong to the plan, so that runs can be paired",
    "train.steps": "the budget belongs to the plan; see its budget option",
    "train.tokens": "the budget belongs to the plan; see its budget option",
    "train.test_tokens": "every arm is judged on the same text",
    "train.eval_tokens": "every arm is validated on the same text",
    "train.threads": "the machine is the same for every arm",
    "train.device": "the machine is the same for every arm",
    "train.parallel": "the machine is the same for every arm",
}
"""What an arm may not change, with the reason that the error quotes."""


@dataclass(frozen=True)
class Arm:
    """One candidate: the base configuration with `overrides`, a dict of dotted key to value.

    `Arm("gated", {"model.output_gate": "head", "optim.lr": 2e-3})`. Values given as text are read by the type of the
    field. No overrides means the base configuration itself.
    """

    name: str
    overrides: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UserError("an arm needs a name; write it as 'name: key=value key=value'")

    @property
    def slug(self) -> str:
        """The name as part of a path that every file system takes."""
        return re.sub(r"[^A-Za-z0-9._+=-]+", "-", self.name).strip(".-") or "arm"

    @classmethod
    def parse(cls, text: str) -> Arm:
        """Read `"name: key=value key=value"`; values are quoted as in a shell."""
        match = re.match(r"\s*(?P<name>.*?)\s*:\s*(?P<rest>\w+\.\w+\s*=.*)$", text, re.DOTALL)
        match = match or re.match(r"\s*(?P<name>.*?)\s*:(?:\s+(?P<rest>.*))?$", text, re.DOTALL)
        if match is None:
            raise UserError(
                f"arm {text!r}: expected 'name: key=value key=value', for instance 'gated: model.output_gate=head'"
            )
        overrides: dict[str, Any] = {}
        try:
            parts = shlex.split(match["rest"] or "")
        except ValueError as error:
            raise UserError(f"arm {text!r}: {error}") from None
        for part in parts:
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise UserError(f"arm {text!r}: expected key=value, got {part!r}")
            if key in overrides:
                raise UserError(f"arm {text!r}: {key} is given twice")
            overrides[key] = value
        return cls(match["name"], overrides)

    @classmethod
    def of_attention(cls, spec: str) -> Arm:
        """Make the arm of an attention spec; its name is the spec's canonical form."""
        canonical = str(AttentionSpec.parse(spec))
        return cls(canonical, {"model.attention": canonical})

    def apply(self, base: RunConfig) -> RunConfig:
        """Return `base` with this arm's overrides; misspelt or fixed keys raise `UserError`."""
        for key, value in self.overrides.items():
            _check_key(self.name, key, value, base)
        try:
            return apply_overrides(base, self.overrides)
        except UserError as error:
            raise UserError(f"arm {self.name!r}: {error}") from None

    def typed(self, base: RunConfig) -> Arm:
        """Return the same arm with every value as the configuration holds it: `"2e-3"` becomes 0.002."""
        values = flatten(self.apply(base))
        return Arm(self.name, {key: values[key] for key in self.overrides})

    def text(self) -> str:
        """Return the form that `parse` reads."""
        pairs = (f"{key}={shlex.quote(_print(value))}" for key, value in self.overrides.items())
        return f"{self.name}: {' '.join(pairs)}".rstrip()


def known_keys(config: RunConfig) -> list[str]:
    """List every dotted key of a run's configuration."""
    return [
        f"{section.name}.{entry.name}"
        for section in dataclasses.fields(config)
        for entry in dataclasses.fields(getattr(config, section.name))
    ]


def _check_key(arm: str, key: str, value: Any, base: RunConfig) -> None:
    keys = known_keys(base)
    if key not in keys:
        own = [k for k in keys if k.split(".")[-1] == key.split(".")[-1]]  # the right field in the wrong section
        hint = f" (did you mean {own[0]!r}?)" if own else nearest(key, keys)
        raise UserError(
            f"arm {arm!r}: unknown key {key!r}{hint}; a key is section.field, such as model.attention or optim.lr"
        )
    if key in FIXED_KEYS:
        raise UserError(f"arm {arm!r} may not change {key}: {FIXED_KEYS[key]}")
    if key == "model.architecture" and value not in DECODERS:
        raise UserError(
            f"arm {arm!r} may not change {key} to {value}: arms are decoders for now ({', '.join(DECODERS)}); other "
            f"architectures have other tasks and scores"
        )


def read_changes(texts: Iterable[str]) -> dict[str, str]:
    """Read `"section.field=value"` texts into a dict, the values still text."""
    changes = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"expected key=value, got {text!r}")
        changes[key.strip()] = value.strip()
    return changes


def with_changes(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Return `config` with dotted keys replaced; one that does not exist raises `UserError` with the nearest."""
    keys = known_keys(config)
    for key in changes:
        if key not in keys:
            raise UserError(f"unknown key {key!r}{nearest(key, keys)}; a key is section.field, such as model.width")
    return apply_overrides(config, changes)


def apply_overrides(config: RunConfig, overrides: Mapping[str, Any]) -> RunConfig:
    """Return `config` with dotted keys replaced; text is read by the field's type.

    `train.steps` and `train.tokens` stand for each other: setting one unsets the other.
    """
    given = {key for key in ("train.steps", "train.tokens") if overrides.get(key) is not None}
    if len(given) == 1:
        unset = "train.tokens" if "train.steps" in given else "train.steps"
        overrides = {**overrides, unset: None}
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in overrides.items():
        section, _, name = key.partition(".")
        kind = typing.get_type_hints(type(getattr(config, section)))[name]
        by_section.setdefault(section, {})[name] = read_value(value, kind, key) if isinstance(value, str) else value
    sections = {name: dataclasses.replace(getattr(config, name), **values) for name, values in by_section.items()}
    return dataclasses.replace(config, **sections)


def read_value(text: str, kind: Any, key: str) -> Any:
    """Read text as the type of a config field: bool, int, float, str, Literal, optional, or a tuple of numbers."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        if text.lower() in ("none", "null") and types.NoneType in inner:
            return None
        return read_value(text, next(t for t in inner if t is not types.NoneType), key)
    if origin is Literal:
        return text  # the config's own check names the choices
    if origin is tuple:
        return tuple(read_value(part, inner[0], key) for part in text.strip("()[] ").split(","))
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise UserError(f"{key}: expected true or false, got {text!r}")
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            what = "a whole number" if kind is int else "a number"
            raise UserError(f"{key}: expected {what}, got {text!r}") from None
    return text


def _print(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def flatten(config: RunConfig) -> dict[str, Any]:
    """Return the configuration as dotted key to plain value."""
    return {
        f"{section}.{name}": value for section, values in config.to_dict().items() for name, value in values.items()
    }


def config_difference(baseline: RunConfig, other: RunConfig) -> list[dict[str, Any]]:
    """List exactly what differs: one `{"key", "baseline", "value"}` for each field whose value is not the same."""
    a, b = flatten(baseline), flatten(other)
    return [{"key": key, "baseline": a[key], "value": b[key]} for key in a if a[key] != b[key]]


def check_arms(arms: Sequence[Arm], base: RunConfig) -> None:
    """Raise `UserError` for arms that share a name, or are the same configuration under two names."""
    if len(arms) < 2:
        given = f"got {arms[0].name!r} alone" if arms else "got none"
        raise UserError(f"a comparison needs at least two arms, {given}")
    seen: dict[str, Arm] = {}
    for arm in arms:
        if arm.slug.lower() in seen:
            first = seen[arm.slug.lower()].name
            same = (
                f"two arms are called {arm.name!r}"
                if first == arm.name
                else f"arms {first!r} and {arm.name!r} have names too alike"
            )
            raise UserError(f"{same}; names must differ by more than case and punctuation, they name folders")
        seen[arm.slug.lower()] = arm
    configs: dict[RunConfig, str] = {}
    for arm in arms:
        config = arm.apply(base)
        if config in configs:
            raise UserError(
                f"arms {configs[config]!r} and {arm.name!r} are the same configuration under two names; drop one"
            )
        configs[config] = arm.name


def parse_arms(attention: Iterable[str], texts: Iterable[str]) -> tuple[Arm, ...]:
    """Make the arms of attention specs and of `"name: key=value"` texts, in this order."""
    return (*map(Arm.of_attention, attention), *map(Arm.parse, texts))
