"""The seam between a weights mechanism and the chunked kernel: a rule turns a tile of scores into weights, and back.

A tile holds whole rows: every key that its rows may see. Shapes: b batch, h query heads, c rows of the tile, w columns.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from clearhead.attention.spec import Weights

BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Hidden:
    """What a tile's rows do not see: for each run of columns with hidden keys, a boolean that broadcasts to it.

    Only those runs are ever touched; for a causal tile that is the block on the diagonal.
    """

    def __init__(self, pieces: list[tuple[slice, Tensor]], empty_possible: bool) -> None:
        self.pieces = pieces
        self.empty_possible = empty_possible
        self._bits: dict[tuple[torch.dtype, float], list[tuple[slice, Tensor, Tensor | None]]] = {}

    def fill_(self, x: Tensor, value: float) -> Tensor:
        """Write `value` where nothing is seen, in place.

        By the bits of the numbers: `and` and `or` are vectorised on a CPU and take whatever is there, NaN too;
        `masked_fill_` does the same eight times slower.
        """
        for columns, keep, bits in self._patterns(x.dtype, value):
            part = x[..., columns].view(keep.dtype).bitwise_and_(keep)
            if bits is not None:
                part.bitwise_or_(bits)
        return x

    def softmax(self, scores: Tensor, out: Tensor | None = None) -> Tensor:
        """Softmax over visible keys, 0 elsewhere and in rows that see nothing. Hidden scores become -inf in place."""
        self.fill_(scores, -math.inf)
        if not self.empty_possible:
            return torch.softmax(scores, dim=-1, out=out)
        empty = scores.amax(dim=-1, keepdim=True) == -math.inf
        s = torch.softmax(scores, dim=-1, out=out)
        s.view(BITS[s.dtype]).bitwise_and_(empty.to(BITS[s.dtype]) - 1)  # NaN there
        return s

    def _patterns(self, dtype: torch.dtype, value: float) -> list[tuple[slice, Tensor, Tensor | None]]:
        """For each piece: all ones where something is seen, else 0; and the bits of `value` where nothing is."""
        found = self._bits.get((dtype, value))
        if found is None:
            found = []
            bits = _bits(value, dtype)
            for columns, hidden in self.pieces:
                ones = hidden.to(BITS[dtype])
                found.append((columns, ones - 1, ones * bits if bits else None))
            self._bits[dtype, value] = found
        return found


@lru_cache
def _bits(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=dtype).view(BITS[dtype]))


_BETWEEN_CALLS = threading.local()  # owner -> its buffers, for this thread's next call


class Scratch:
    """Buffers by name, kept from one tile to the next: fresh memory costs as much as several passes over a tile.

    On a CPU small ones are kept from one call to the next of the same owner and thread, too: at short contexts page
    faults are an eighth of a call. They are taken out of the store while they are in use, so two calls never share.
    """

    KEPT = 1 << 18  # numbers in a buffer that outlives its call

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._held: dict[str, Tensor] = vars(_BETWEEN_CALLS).pop(owner, {})

    def take(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of `shape`, and dtype and device of `like`, in the memory of the last one of that name."""
        size = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < size or held.dtype != like.dtype or held.device != like.device:
            with torch.inference_mode(False):  # a tensor made in that mode could not be written to outside it
                held = self._held[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return held[:size].view(shape)

    def __del__(self) -> None:
        kept = {name: t for name, t in self._held.items() if t.numel() <= self.KEPT and t.device.type == "cpu"}
        if kept and _BETWEEN_CALLS is not None:  # as names are at the end of the interpreter
            vars(_BETWEEN_CALLS)[self._owner] = kept


class TileRule(ABC):
    """How a weights mechanism works on a tile. `scores` is the rule's to overwrite.

    A rule is made for one call. What it returns is read before its next tile, so it may keep a `Scratch` of its own
    name.
    """

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
