"""Reading arguments with tyro: plain dataclasses in, their texts out as help. Used by `cli.py` alone, no torch.

tyro reports its own mistakes (an unknown flag, text where a number belongs) in a box and exits with 2. The sections of
a run's configuration are read into a `Part` first and built afterwards, so that a value which the configuration refuses
is a `UserError` like any other, in one line.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

ELSEWHERE: dict[str, set[str]] = {
    "ModelConfig": {"vocab_size", "context"},
    "DataConfig": {"source", "context"},
    "OptimConfig": set(),
    "ObjectiveConfig": set(),
    "TrainConfig": {"steps", "tokens"},
}
"""The configs that become sections of options, and which of their fields `train` sets by options of its own."""


@dataclass(frozen=True)
class Part:
    """A section of a run's configuration as the command line gave it, not yet built."""

    kind: type
    values: dict[str, Any]

    def build(self, **more: Any) -> Any:
        """Build the section; raises `UserError` for values that it refuses."""
        return self.kind(**(self.values | more))


def parse(kind: Any, command: str, arguments: Sequence[str], **defaults: Any) -> Any:
    """Read `arguments` into the dataclass `kind`, whose docstring and EXAMPLES head the help.

    `defaults` are the values that sections of configuration begin from, by the name of their class.
    """
    import tyro

    examples = textwrap.indent(inspect.cleandoc(kind.EXAMPLES), "  ")
    about = f"{inspect.cleandoc(kind.__doc__)}\n\nexamples\n{examples}"
    return tyro.cli(
        kind,
        prog=f"clearhead {command}",
        description=about,
        args=list(arguments),
        registry=_registry(defaults),
    )


def merge(arguments: Sequence[str], *flags: str) -> list[str]:
    """Turn `--arm a --arm b` into `--arm a b`: a list option that is given twice means both, not the last."""
    values: dict[str, list[str]] = {}
    rest: list[str] = []
    target = rest
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        flag = flag.replace("_", "-")
        if flag in flags:
            target = values.setdefault(flag, [])
            target += [value] if equals else []
        elif argument.startswith("-"):
            target = rest
            rest.append(argument)
        else:
            target.append(argument)
    return rest + [part for flag, given in values.items() for part in (flag, *given)]


def given(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of `--flag value` or `--flag=value` before anything is read; None when it is not there."""
    for argument, following in pairwise([*arguments, ""]):
        if argument == flag:
            return following
        if argument.startswith(f"{flag}="):
            return argument.removeprefix(f"{flag}=")
    return None


def _registry(defaults: dict[str, Any]) -> Any:
    """Teach tyro to read a config dataclass into a `Part`; `defaults` are instances by their class's name."""
    from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructFieldSpec

    registry = ConstructorRegistry()

    @registry.struct_rule
    def rule(info: Any) -> Any:
        kind = info.type
        if getattr(kind, "__name__", None) not in ELSEWHERE:
            return None
        start = defaults[kind.__name__]
        hints, texts = typing.get_type_hints(kind), field_texts(kind)
        return StructConstructorSpec(
            instantiate=lambda **values: Part(kind, values),
            fields=tuple(
                StructFieldSpec(entry.name, hints[entry.name], getattr(start, entry.name), texts[entry.name])
                for entry in dataclasses.fields(kind)
                if entry.name not in ELSEWHERE[kind.__name__]
            ),
        )

    return registry


def field_texts(kind: type) -> dict[str, str]:
    """Return the text under each field of a dataclass, its lines joined."""
    body = cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]).body
    texts: dict[str, str] = {entry.name: "" for entry in dataclasses.fields(cast(Any, kind))}
    for statement, following in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            value = following.value if isinstance(following, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                texts[statement.target.id] = " ".join(value.value.split())
    return texts
