"""What the table of docs/faults.md says of a test: the fault, and what happens. `run.py` reads it off the functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

F = TypeVar("F", bound=Callable[..., object])


def fault(name: str, happens: str) -> Callable[[F], F]:
    """Decorator of a test: the row of the table that it stands for."""

    def mark(test: F) -> F:
        test.fault = (name, happens)  # type: ignore[attr-defined]
        return test

    return mark
