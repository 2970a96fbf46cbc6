"""Lazy public names: a package lists where its names live, and each is imported on first use (PEP 562).

`import clearhead` and `clearhead --help` stay fast because nothing here imports torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def attach(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `(__getattr__, __dir__)` for `package`.

    `names` maps a public name to `"module:attribute"`, or to `"module:"` for the module itself.
    """

    def getattribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module_name, _, attribute = names[name].partition(":")
        module = importlib.import_module(module_name)
        return getattr(module, attribute) if attribute else module

    def directory() -> list[str]:
        return sorted(names)

    return getattribute, directory
