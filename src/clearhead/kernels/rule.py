"""The seam between a weights mechanism and the chunked kernel: a rule turns a tile of scores into weights, and back.

A tile holds whole rows: every key that its rows may see. Shapes: b batch, h query heads, c rows of the tile, w columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from clearhead.attention.spec import Weights


class Hidden:
    """What a tile's rows do not see: for each run of columns with hidden keys, a boolean that broadcasts to it.

    Only those runs are ever touched; for a causal tile that is the block on the diagonal.
    """

    def __init__(self, pieces: list[tuple[slice, Tensor]], empty_possible: bool) -> None:
        self.pieces = pieces
        self.empty_possible = empty_possible

    def fill_(self, x: Tensor, value: float) -> Tensor:
        """Write `value` where nothing is seen, in place."""
        for columns, hidden in self.pieces:
            x[..., columns].masked_fill_(hidden, value)
        return x

    def softmax(self, scores: Tensor) -> Tensor:
        """Softmax over visible keys, 0 elsewhere and in rows that see nothing. Hidden scores become -inf in place."""
        self.fill_(scores, float("-inf"))
        if not self.empty_possible:
            return torch.softmax(scores, dim=-1)
        empty = scores.amax(dim=-1, keepdim=True) == float("-inf")
        return torch.softmax(scores, dim=-1).masked_fill_(empty, 0.0)


class TileRule(ABC):
    """How a weights mechanism works on a tile. `scores` is the rule's to overwrite."""

    @abstractmethod
    def weights(self, scores: Tensor, hide: Hidden) -> tuple[Tensor, Tensor | None]:
        """Return (w [b,h,c,w], factor [b,h,c,1] or None); the weights are w * factor, 0 where nothing is seen."""

    @abstractmethod
    def backward(
        self, scores: Tensor, hide: Hidden, gradient_w: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (d scores, w, factor), given g = d weights (may be overwritten) and delta = sum_k g_k w_k [b,h,c,1].

        delta costs nothing: it is the row sum of d out * out. Hidden columns of d scores must be 0.
        """


TILE_RULES: dict[type[Weights], Callable[[Any], TileRule]] = {}
R = TypeVar("R", bound=type[TileRule])


def tile_rule(choice: type[Weights]) -> Callable[[R], R]:
    """Class decorator: the tile rule of a weights choice, made from the choice."""

    def add(rule: R) -> R:
        TILE_RULES[choice] = rule
        return rule

    return add
