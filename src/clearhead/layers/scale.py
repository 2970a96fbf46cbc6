"""Multiplication by a constant that is kept in a named buffer.

A constant near 1 that is applied once a sum must not be rounded to half precision: 0.9948 becomes 0.9961, and over 400
sums the stream's variance is off by a factor e. So the buffers here stay fp32 through `model.to(torch.bfloat16)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn as nn
from torch import Tensor


class Constants(nn.Module):
    """A module whose buffers keep their own dtype: a cast of the whole model passes them by, a device move does not."""

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
        return self

    def _constant(self, name: str, value: float, *, shape: tuple[int, ...] = ()) -> None:
        self.register_buffer(name, torch.full(shape, value, dtype=torch.float32))


class Scale(Constants):
    """scale * x, taken in fp32 or wider and answered in the dtype of x."""

    scale: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self._constant("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return (widened(x) * self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        """See the class."""
        return f"scale={value_of(self.scale)}"


def widened(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is when it is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def value_of(constant: Tensor) -> str:
    """The constant as text, for `extra_repr`."""
    return "?" if constant.is_meta else f"{float(constant.reshape(-1)[0]):.6g}"
