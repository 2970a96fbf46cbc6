"""The generated tasks by name, and how their names are read: synthetic:NAME or synthetic:NAME,option=value,..."""

from __future__ import annotations

import dataclasses
from typing import Any

from clearhead.data.config import SYNTHETIC
from clearhead.data.synthetic.copy import Copy
from clearhead.data.synthetic.furthest import Furthest
from clearhead.data.synthetic.needle import Needle
from clearhead.data.synthetic.programs import Programs
from clearhead.data.synthetic.recall import Recall
from clearhead.data.synthetic.state import State
from clearhead.data.synthetic.task import Synthetic
from clearhead.data.synthetic.two_step import TwoStep
from clearhead.errors import UserError, unknown

TASKS: dict[str, type[Synthetic]] = {
    kind.name: kind for kind in (Needle, Copy, Recall, TwoStep, State, Furthest, Programs)
}


def parse(source: str) -> Synthetic:
    """Read a name. Raises `UserError` for a task or an option that does not exist, or a value that it refuses."""
    name, *parts = source.removeprefix(SYNTHETIC).split(",")
    if name not in TASKS:
        raise unknown("task of synthetic data", name, TASKS)
    kind = TASKS[name]
    fields = {field.name: field for field in dataclasses.fields(kind)}
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, text = part.partition("=")
        if not equals:
            raise UserError(f"{source}: expected option=value, got {part!r}")
        if key not in fields:
            raise unknown(f"option of synthetic:{name}", key, fields)
        if key in options:
            raise UserError(f"{source}: {key} is given twice")
        options[key] = _value(source, key, text, type(fields[key].default))
    return kind(**options)


def _value(source: str, key: str, text: str, kind: type) -> Any:
    try:
        return kind(text)
    except ValueError:
        words = {int: "a whole number", float: "a number"}
        raise UserError(f"{source}: {key}: expected {words[kind]}, got {text!r}") from None


def describe() -> list[str]:
    """A line for each task: its name with its options, and what it is."""
    lines = []
    for name, kind in TASKS.items():
        options = ",".join(f"{field.name}={field.default}" for field in dataclasses.fields(kind))
        doc = (__import__(kind.__module__, fromlist=["__doc__"]).__doc__ or "").splitlines()[0]
        lines.append(f"{SYNTHETIC}{name},{options}\n    {doc}")
    return lines
