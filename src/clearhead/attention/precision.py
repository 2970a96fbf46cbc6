"""Keep autocast out of places that chose their precision: a kernel's float32 must not become bf16 by context."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")


def without_autocast(function: Callable[P, T]) -> Callable[P, T]:
    """Decorator: run with autocast off on the device of the first argument, a tensor or something with a tensor `q`."""

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        first = args[0]
        device = first.device if isinstance(first, Tensor) else first.q.device  # type: ignore[attr-defined]
        if not torch.is_autocast_enabled(device.type):
            return function(*args, **kwargs)
        with torch.autocast(device.type, enabled=False):
            return function(*args, **kwargs)

    return run


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays; everything else is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
