"""The conditions that a `Mask` is made of: causal, band, key range, segments, dense.

Each says what a block of query rows and key columns sees, and bounds it, so that kernels can skip whole blocks.
Shapes: b batch, h query heads, n query rows, m key columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 1 << 60  # a bound that no position reaches


def narrow_dim(t: Tensor, dim: int, part: slice) -> Tensor:
    """Cut a dimension that may be broadcast: size 1 stays."""
    return t if t.shape[dim] == 1 else t.narrow(dim, part.start, part.stop - part.start)


@dataclass(frozen=True, eq=False)
class Rows:
    """A block of query rows and key columns: indices on the tensors' device, and the rows' offset."""

    query: Tensor  # [n'] row indices
    key: Tensor  # [m'] column indices
    offset: int | Tensor  # int, or [b]
    listed: bool = False  # columns (for those who only look, rows too) are a list with gaps, not a run

    def positions(self) -> Tensor:
        """Positions of the rows among the keys: [1|b, 1, n', 1]."""
        if isinstance(self.offset, int):
            return (self.query + self.offset).view(1, 1, -1, 1)
        return self.query.view(1, 1, -1, 1) + self.offset.view(-1, 1, 1, 1)

    def keys(self) -> Tensor:
        """Column indices as [1, 1, 1, m']."""
        return self.key.view(1, 1, 1, -1)


@dataclass(frozen=True, eq=False)
class Term:
    """One condition. Subclasses say what a block sees, and bound it so that kernels can skip blocks."""

    def visible(self, rows: Rows) -> Tensor:
        """Boolean, broadcastable to [b, h, n', m']."""
        raise NotImplementedError

    def key_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """Columns [low, high) outside which rows at positions q_low..q_high (inclusive) see nothing."""
        return -FAR, FAR

    def sure_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """Columns [low, high) all of which every row at positions q_low..q_high sees; empty if unknown."""
        return 0, 0

    def narrow(self, batch: slice, heads: slice) -> Term:
        """The same term for some batch rows and query heads."""
        return self

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """Raise `ValueError` when a tensor does not fit queries [b, h, n, .] and m keys."""

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors of this term, in the order `decode` takes them."""
        return ()

    def numbers(self) -> tuple[int, ...]:
        """The whole numbers of this term, in the order `decode` takes them."""
        return ()

    @classmethod
    def decode(cls, numbers: list[int], tensors: Iterator[Tensor]) -> Term:
        """Make the term again from `numbers` and the next of `tensors` (see `Mask.encode`)."""
        return cls(*numbers)


@dataclass(frozen=True, eq=False)
class Causal(Term):
    """Keys up to the query's own position; keys before `prefix` are visible to every query (prefix LM)."""

    prefix: int = 0

    def visible(self, rows: Rows) -> Tensor:
        """See `Term.visible`."""
        seen = rows.keys() <= rows.positions()
        return seen | (rows.keys() < self.prefix) if self.prefix else seen

    def key_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """See `Term.key_bounds`."""
        return -FAR, max(q_high + 1, self.prefix)

    def sure_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """See `Term.sure_bounds`."""
        return -FAR, max(q_low + 1, self.prefix)

    def numbers(self) -> tuple[int, ...]:
        """See `Term.numbers`."""
        return (self.prefix,)


@dataclass(frozen=True, eq=False)
class Band(Term):
    """Keys from `left` before to `right` after the query's position."""

    left: int
    right: int

    def visible(self, rows: Rows) -> Tensor:
        """See `Term.visible`."""
        distance = rows.keys() - rows.positions()
        return (distance >= -self.left) & (distance <= self.right)

    def key_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """See `Term.key_bounds`."""
        return q_low - self.left, q_high + self.right + 1

    def sure_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """See `Term.sure_bounds`."""
        return q_high - self.left, q_low + self.right + 1

    def numbers(self) -> tuple[int, ...]:
        """See `Term.numbers`."""
        return (self.left, self.right)


@dataclass(frozen=True, eq=False)
class KeyRange(Term):
    """Batch row b sees keys start[b] <= k < end[b] (padding on either side)."""

    start: Tensor | None
    end: Tensor | None

    def visible(self, rows: Rows) -> Tensor:
        """See `Term.visible`."""
        seen = torch.ones((), dtype=torch.bool, device=rows.key.device)
        if self.start is not None:
            seen = seen & (rows.keys() >= self.start.view(-1, 1, 1, 1))
        if self.end is not None:
            seen = seen & (rows.keys() < self.end.view(-1, 1, 1, 1))
        return seen

    def key_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """See `Term.key_bounds`; reads the tensors on the host, so a kernel asks only on a CPU."""
        low = -FAR if self.start is None else int(self.start.min())
        high = FAR if self.end is None else int(self.end.max())
        return low, high

    def sure_bounds(self, q_low: int, q_high: int) -> tuple[int, int]:
        """See `Term.sure_bounds`."""
        low = -FAR if self.start is None else int(self.start.max())
        high = FAR if self.end is None else int(self.end.min())
        return low, high

    def narrow(self, batch: slice, heads: slice) -> KeyRange:
        """See `Term.narrow`."""
        cut = [None if t is None else narrow_dim(t, 0, batch) for t in (self.start, self.end)]
        return KeyRange(cut[0], cut[1])

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Term.tensors`."""
        return tuple(t for t in (self.start, self.end) if t is not None)

    def numbers(self) -> tuple[int, ...]:
        """See `Term.numbers`: which of the two ends is there."""
        return (int(self.start is not None), int(self.end is not None))

    @classmethod
    def decode(cls, numbers: list[int], tensors: Iterator[Tensor]) -> KeyRange:
        """See `Term.decode`."""
        start = next(tensors) if numbers[0] else None
        return cls(start, next(tensors) if numbers[1] else None)

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Term.check`."""
        for t in self.tensors():
            if t.shape[0] not in (1, b):
                raise ValueError(f"mask: key lengths are for {t.shape[0]} rows, the batch has {b}")


@dataclass(frozen=True, eq=False)
class Segments(Term):
    """Packed documents: a query sees keys of its own segment. Negative is padding: it sees none, none sees it."""

    query: Tensor  # [b, n]
    key: Tensor  # [b, m]

    def visible(self, rows: Rows) -> Tensor:
        """See `Term.visible`."""
        q_b1n1 = self.query[:, rows.query].unsqueeze(1).unsqueeze(-1)
        k_b11m = self.key[:, rows.key].unsqueeze(1).unsqueeze(1)
        return (q_b1n1 == k_b11m) & (q_b1n1 >= 0)

    def narrow(self, batch: slice, heads: slice) -> Segments:
        """See `Term.narrow`."""
        return Segments(narrow_dim(self.query, 0, batch), narrow_dim(self.key, 0, batch))

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Term.tensors`."""
        return (self.query, self.key)

    @classmethod
    def decode(cls, numbers: list[int], tensors: Iterator[Tensor]) -> Segments:
        """See `Term.decode`."""
        return cls(next(tensors), next(tensors))

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Term.check`."""
        have = (self.query.shape[1], self.key.shape[1])
        if have != (n, m):
            raise ValueError(f"mask: segments are for {have[0]} queries and {have[1]} keys, the call has {n} and {m}")
        if self.query.shape[0] not in (1, b) or self.key.shape[0] not in (1, b):
            raise ValueError(f"mask: segments are for {self.query.shape[0]} rows, the batch has {b}")


@dataclass(frozen=True, eq=False)
class Dense(Term):
    """Any boolean tensor broadcastable to [b, h, n, m], True = visible."""

    mask: Tensor

    def visible(self, rows: Rows) -> Tensor:
        """See `Term.visible`."""
        part = self.mask
        if part.shape[-2] > 1:
            part = part[..., rows.query, :]
        return part[..., rows.key] if part.shape[-1] > 1 else part

    def narrow(self, batch: slice, heads: slice) -> Dense:
        """See `Term.narrow`."""
        return Dense(narrow_dim(narrow_dim(self.mask, 0, batch), 1, heads))

    def tensors(self) -> tuple[Tensor, ...]:
        """See `Term.tensors`."""
        return (self.mask,)

    @classmethod
    def decode(cls, numbers: list[int], tensors: Iterator[Tensor]) -> Dense:
        """See `Term.decode`."""
        return cls(next(tensors))

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Term.check`."""
        if any(have not in (1, want) for have, want in zip(self.mask.shape, (b, h, n, m), strict=True)):
            raise ValueError(f"mask: shape {tuple(self.mask.shape)} does not broadcast to {(b, h, n, m)}")


# What crosses into a torch operator as text is read back through this table; a new term joins it.
TERMS: dict[str, type[Term]] = {
    "causal": Causal,
    "band": Band,
    "range": KeyRange,
    "segments": Segments,
    "dense": Dense,
}
