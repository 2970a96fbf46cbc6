"""Temperatures of a patched layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TemperatureOptions:
    """How temperatures are made."""


def of(module: Any, query: Any, key: Any, value: Any, mask: Any) -> Any:
    """The layer's temperatures for one call; None when it has none."""
    return None


def install(model: Any, modules: Any, spec: Any, options: Any) -> None:
    """Give layers their temperatures."""
    raise NotImplementedError("temperatures on a Hugging Face model")


def remove(model: Any) -> None:
    """Take them away."""
