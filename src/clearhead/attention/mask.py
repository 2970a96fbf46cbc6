"""`Mask`: which keys a query may see, as a frozen conjunction of small terms, made into numbers block by block.

No N x M tensor exists unless a backend asks for one. `a & b` sees what both see. Shapes: b batch, h query heads,
g key/value heads, n query rows, m key columns.

A query row i stands at position i + offset among the keys. The offset is one number for the whole mask (or one per
batch row): given, or bottom-right aligned (m - n), or, with key lengths and fewer queries than keys, length - n: the
queries are then the last valid tokens of a preallocated cache, whatever the size of its buffer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clearhead.attention.blocks import Blocks
from clearhead.attention.count import count_runs
from clearhead.attention.terms import TERMS, Band, Causal, Dense, KeyRange, Rows, Segments, Term, narrow_dim


@dataclass(frozen=True, eq=False)
class Mask:
    """A conjunction of terms. `Mask()` sees everything; the class methods make the usual masks; `a & b` combines."""

    terms: tuple[Term, ...] = ()
    offset: int | Tensor | None = None  # None: found from the lengths at the call

    # -- makers -------------------------------------------------------------------------------------------------------

    @classmethod
    def causal(cls, offset: int | Tensor | None = None, *, prefix: int = 0) -> Mask:
        """Keys up to the query's own position; bottom-right aligned unless an offset (int, or [b]) is given."""
        return cls((Causal(prefix),), offset)

    @classmethod
    def window(cls, size: int, *, causal: bool = True, offset: int | Tensor | None = None) -> Mask:
        """A sliding window: causal, `size` keys including the own one; bidirectional, (size - 1) // 2 on each side."""
        if size < 1:
            raise ValueError(f"Mask.window: expected a size of at least 1, got {size}")
        side = (size - 1) // 2
        return cls((Causal(), Band(size - 1, 0)) if causal else (Band(side, side),), offset)

    @classmethod
    def key_lengths(cls, lengths: Tensor) -> Mask:
        """Right padding, or a preallocated cache: batch row b sees keys below lengths[b]."""
        return cls.key_range(None, lengths)

    @classmethod
    def key_range(cls, start: Tensor | None, end: Tensor | None) -> Mask:
        """Batch row b sees keys start[b] <= k < end[b]."""
        for name, t in (("start", start), ("end", end)):
            if t is not None and (t.dim() != 1 or t.is_floating_point() or t.dtype == torch.bool):
                raise ValueError(f"Mask: {name} must be a 1-d integer tensor [batch], got {t.dtype} {tuple(t.shape)}")
        return cls() if start is None and end is None else cls((KeyRange(start, end),))

    @classmethod
    def segments(cls, query: Tensor, key: Tensor | None = None) -> Mask:
        """Packed documents: [b, n] and [b, m] segment numbers; negative = padding."""
        key = query if key is None else key
        if query.dim() != 2 or key.dim() != 2:
            raise ValueError(
                f"Mask.segments: expected [batch, length] tensors, got {tuple(query.shape)} and {tuple(key.shape)}"
            )
        return cls((Segments(query, key),))

    @classmethod
    def dense(cls, mask: Tensor) -> Mask:
        """A boolean tensor (True = visible) broadcastable to [b, h, n, m]."""
        if mask.dtype != torch.bool:
            raise TypeError(f"Mask.dense: expected a bool tensor (True = visible), got {mask.dtype}; use mask.bool()")
        return cls((Dense(mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask),))

    def __and__(self, other: Mask) -> Mask:
        mine, theirs = self.offset, other.offset
        if mine is None or theirs is None or mine is theirs:
            return Mask(self.terms + other.terms, theirs if mine is None else mine)
        if isinstance(mine, Tensor) or isinstance(theirs, Tensor) or mine != theirs:
            raise ValueError("Mask: two masks with different offsets cannot be combined; give the offset once")
        return Mask(self.terms + other.terms, mine)

    # -- what it says -------------------------------------------------------------------------------------------------

    @property
    def is_causal(self) -> bool:
        """Whether a causal term is among the conditions."""
        return any(isinstance(t, Causal) for t in self.terms)

    def find(self, kind: type[Term]) -> list[Term]:
        """The terms of one class."""
        return [t for t in self.terms if isinstance(t, kind)]

    def resolve(self, n: int, m: int) -> Mask:
        """Return the same mask with its offset decided for n queries and m keys (see the top of this file)."""
        if self.offset is not None:
            return self
        ends = [t.end for t in self.terms if isinstance(t, KeyRange) and t.end is not None]
        if n != m and ends:
            return replace(self, offset=ends[0] - n)
        return replace(self, offset=m - n)

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """Raise `ValueError` when a tensor of the mask does not fit queries [b, h, n, .] and keys [b, ., m, .]."""
        if isinstance(self.offset, Tensor) and (self.offset.dim() != 1 or self.offset.shape[0] not in (1, b)):
            raise ValueError(
                f"mask: expected an offset for each of {b} batch rows, got a tensor of shape {tuple(self.offset.shape)}"
            )
        for term in self.terms:
            term.check(b, h, n, m)

    def visible(self, rows: Rows) -> Tensor | None:
        """What a block sees, broadcastable to [b, h, n', m']; None when it sees everything."""
        seen: Tensor | None = None
        for term in self.terms:
            seen = term.visible(rows) if seen is None else seen & term.visible(rows)
        return seen

    def dense_tensor(self, n: int, m: int, device: torch.device) -> Tensor | None:
        """The whole mask as one boolean tensor, or None when everything is visible. Quadratic: the caller decides."""
        mask = self.resolve(n, m)
        return mask.visible(
            Rows(torch.arange(n, device=device), torch.arange(m, device=device), mask.resolved_offset())
        )

    def resolved_offset(self) -> int | Tensor:
        """The offset, once `resolve` has decided it."""
        if self.offset is None:
            raise RuntimeError("mask used before resolve(n, m)")
        return self.offset

    def offset_range(self) -> tuple[int, int]:
        """Smallest and largest offset over the batch, read on the host."""
        offset = self.resolved_offset()
        return (offset, offset) if isinstance(offset, int) else (int(offset.min()), int(offset.max()))

    def may_have_empty_rows(self, n: int, m: int) -> bool:
        """Whether some query might see no key; decided without reading tensors, so True may be a false alarm."""
        offset = self.resolved_offset()
        if m == 0:
            return True
        if any(isinstance(t, KeyRange | Segments | Dense) for t in self.terms) or isinstance(offset, Tensor):
            return True
        for term in self.terms:
            if isinstance(term, Causal) and term.prefix == 0 and offset < 0:
                return True
            if isinstance(term, Band) and (offset + term.right < 0 or n - 1 + offset - term.left >= m):
                return True
        return False

    def visible_count(self, n: int, m: int, device: torch.device | str) -> Tensor:
        """How many keys each query sees: [1|b, 1|h, n] int64; linear in length but for dense masks and prefixes."""
        mask = self.resolve(n, m)
        device = torch.device(device)
        counted = count_runs(mask.terms, mask.resolved_offset(), n, m, device)
        if counted is not None:
            return counted
        keys = torch.arange(m, device=device)
        counts = []
        step = max(1, min(1024, (1 << 22) // max(m, 1)))
        for first in range(0, max(n, 1), step):
            rows = Rows(torch.arange(first, min(first + step, n), device=device), keys, mask.resolved_offset())
            seen = mask.visible(rows)
            assert seen is not None  # a mask without terms is an interval
            counts.append(seen.expand(*seen.shape[:2], rows.query.numel(), m).sum(-1))
        return torch.cat(counts, dim=-1)

    def some_visible(self, n: int, m: int, device: torch.device) -> Tensor:
        """Whether each query sees any key, [1|b, 1|h, n] bool.

        A block pattern hides no query's own key, so it need not be counted unless a dense mask may.
        """
        mask = self if self.find(Dense) else self.without(self.blocks)
        return mask.visible_count(n, m, device) > 0

    def unseen_keys(self, m: int, g: int, device: torch.device) -> Tensor | None:
        """Keys that no query can see (padding), as [1|b, 1|g, m, 1]; None when no term can tell.

        Their contents are zeroed before any arithmetic, so that garbage there, even NaN, changes nothing.
        """
        unseen: Tensor | None = None
        for term in self.terms:
            part: Tensor | None = None
            if isinstance(term, KeyRange):
                part = ~term.visible(Rows(torch.arange(1, device=device), torch.arange(m, device=device), 0))[:, :, 0]
            elif isinstance(term, Segments):
                part = (term.key < 0).unsqueeze(1)
            elif isinstance(term, Dense) and term.mask.shape[-1] == m:
                part = ~term.mask.any(dim=-2)  # [b|1, h|1, m]
                if part.shape[1] > 1:  # a key/value head is unseen when all of its query heads do not see it
                    part = part.unflatten(1, (g, -1)).all(dim=2)
            if part is not None:
                unseen = part if unseen is None else unseen | part
        return None if unseen is None else unseen.unsqueeze(-1)

    # -- for kernels --------------------------------------------------------------------------------------------------

    def key_bounds(self, first: int, last: int, m: int) -> tuple[int, int]:
        """Columns that rows first..last-1 may see, as [low, high) within [0, m); reads tensors on the host."""
        low_offset, high_offset = self.offset_range()
        low, high = 0, m
        for term in self.terms:
            term_low, term_high = term.key_bounds(first + low_offset, last - 1 + high_offset)
            low, high = max(low, term_low), min(high, term_high)
        return (low, high) if low < high else (0, 0)

    @property
    def blocks(self) -> Blocks | None:
        """The block pattern among the terms."""
        return next((t for t in self.terms if isinstance(t, Blocks)), None)

    def without(self, term: Term | None) -> Mask:
        """The same mask but for one of its terms."""
        return Mask(tuple(t for t in self.terms if t is not term), self.offset)

    def sure_bounds(self, first: int, last: int, m: int) -> tuple[int, int]:
        """Columns that every one of rows first..last-1 surely sees, as [low, high)."""
        low_offset, high_offset = self.offset_range()
        low, high = 0, m
        for term in self.terms:
            # The lowest and the highest position bound what all rows share, whatever their batch row.
            term_low, term_high = term.sure_bounds(first + low_offset, last - 1 + high_offset)
            low, high = max(low, term_low), min(high, term_high)
        return (low, high) if low < high else (0, 0)

    def narrow(self, batch: slice, heads: slice) -> Mask:
        """The same mask for some batch rows and query heads."""
        offset = self.resolved_offset()
        cut = narrow_dim(offset, 0, batch) if isinstance(offset, Tensor) else offset
        return Mask(tuple(t.narrow(batch, heads) for t in self.terms), cut)

    def tensors(self) -> list[Tensor]:
        """The tensors of the mask, in the order of `encode`."""
        offset = self.resolved_offset()
        return [*([] if isinstance(offset, int) else [offset]), *(t for term in self.terms for t in term.tensors())]

    def encode(self) -> tuple[str, list[Tensor]]:
        """Text and tensors from which `decode` makes the same mask: what a torch operator can take as arguments."""
        offset = self.resolved_offset()
        words = [str(offset) if isinstance(offset, int) else "tensor"]
        names = {cls: name for name, cls in TERMS.items()}
        for term in self.terms:
            words.append(":".join([names[type(term)], *map(str, term.numbers())]))
        return ";".join(words), self.tensors()

    @classmethod
    def decode(cls, code: str, tensors: list[Tensor]) -> Mask:
        """Inverse of `encode`."""
        head, *words = code.split(";")
        rest = iter(tensors)
        offset: int | Tensor = next(rest) if head == "tensor" else int(head)
        terms = []
        for word in words:
            name, *numbers = word.split(":")
            terms.append(TERMS[name].decode([int(x) for x in numbers], rest))
        return cls(tuple(terms), offset)
