"""What a Feedback Transformer remembers: one vector per token, and the keys and values made of it.

`Window` holds keys and values while a pass runs, `FeedbackState` the memory vectors between calls.

Shapes: b batch, n memories, w width, g key/value heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clearhead.memory.transformer_xl import NONE


class Window:
    """The last `limit` keys and values, side by side in the last dimension: [b, g, n, 2d], oldest first.

    Appended tokens stay in pieces, and neighbours of equal size are joined. So a token is copied a logarithmic number
    of times and there are few pieces to put together per reading, all by plain `cat`: autograd needs nothing special,
    and nothing that it has saved is ever written to. (One preallocated buffer with a gradient of our own was no faster
    at windows of 64 and 256 and a little faster at 32; a plain list was slower everywhere.)
    """

    def __init__(self, first_bgne: Tensor, limit: int) -> None:
        self.limit = limit
        self._most = max(limit // 2, 1)  # of a joined piece, so that what has left the window can be let go
        self._pieces = [first_bgne]
        self._size = first_bgne.shape[2]

    def append(self, one_bg1e: Tensor) -> None:
        """Take the keys and values of one more token."""
        pieces = self._pieces
        pieces.append(one_bg1e)
        self._size += 1
        # The first piece is what the pass began with: it is never joined.
        while len(pieces) > 2 and pieces[-1].shape[2] == pieces[-2].shape[2] <= self._most // 2:
            last = pieces.pop()
            pieces[-1] = torch.cat((pieces[-1], last), dim=2)
        while self._size - pieces[0].shape[2] >= self.limit:
            self._size -= pieces.pop(0).shape[2]

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the last `limit` tokens or fewer, each [b, g, n, d]."""
        both_bgne = self.whole()
        key_bgnd, value_bgnd = both_bgne.chunk(2, dim=-1)
        return key_bgnd, value_bgnd

    def whole(self) -> Tensor:
        """Keys and values as they are kept, [b, g, n, 2d]."""
        first, *rest = self._pieces
        over = self._size - self.limit
        if over > 0:
            first = first[:, :, over:]
        return torch.cat((first, *rest), dim=2) if rest else first


class FeedbackState:
    """The last `window` memory vectors of each row, how many tokens of its document the row has read, and what the
    caller calls that document.

    Vectors stand at the right end: slot -1 is the newest. Slots that hold nothing yet are zero. Keys and values are
    not part of the state, because weights may change between calls; while no gradients are taken, those of the last
    call are kept beside it and used again as long as the weights are the same tensors of the same version. (A write
    through `parameter.data` escapes that; call `forget_projections` after one.)

    Tensors are replaced and never written to, so `mark` costs nothing.
    """

    def __init__(self, memory_bnw: Tensor) -> None:
        self.memory = memory_bnw
        self.lengths = torch.zeros(memory_bnw.shape[0], dtype=torch.int64, device=memory_bnw.device)
        self.number = torch.full_like(self.lengths, NONE)  # NONE: the caller has not said
        self._equal: int | None = 0  # the common length, while there is one
        self._projected: tuple[Hashable, tuple[Tensor, ...]] | None = None

    @classmethod
    def allocate(
        cls, batch: int, window: int, width: int, *, dtype: torch.dtype = torch.float32, device: Any = None
    ) -> FeedbackState:
        """An empty state. Its size does not grow."""
        if min(batch, window, width) < 1:
            raise ValueError(
                f"FeedbackState.allocate: batch, window and width must be at least 1, got {batch}, {window}, {width}"
            )
        return cls(torch.zeros(batch, window, width, dtype=dtype, device=device))

    @property
    def window(self) -> int:
        """Memories that a row can hold."""
        return self.memory.shape[1]

    @property
    def equal_length(self) -> int | None:
        """The common length of all rows, where it is known on the host; None = see `lengths`."""
        return self._equal

    @property
    def bytes(self) -> int:
        """Size of all that is held, projections included."""
        held = [self.memory, self.lengths, self.number, *(self._projected[1] if self._projected is not None else ())]
        return sum(t.untyped_storage().nbytes() for t in held)

    def projections(self, made_by: Hashable) -> tuple[Tensor, ...] | None:
        """Keys and values of the memories, if the ones that are kept were made by the same weights."""
        if self._projected is None or self._projected[0] != made_by:
            return None
        return self._projected[1]

    def forget_projections(self) -> None:
        """Let go of keys and values; the next call makes them anew."""
        self._projected = None

    def enter(self, number_b: Tensor, rows_b: Tensor | None = None) -> None:
        """Say what documents the next tokens belong to, [b] int: a row whose number has changed is emptied.

        rows_b: bool, rows that do get a token; None = all. A row without a number so far goes on. Lengths are read on
        the host, so that what is computed hangs on what is held and not on how it came to be.
        """
        changed_b = (self.number != NONE) & (self.number != number_b)
        if rows_b is not None:
            changed_b &= rows_b
        if bool(changed_b.any()):
            self.reset(changed_b)
        shortest, longest = (int(n) for n in self.lengths.aminmax())
        self._equal = shortest if shortest == longest else None
        self.number = number_b.clone() if rows_b is None else torch.where(rows_b, number_b, self.number)

    def advance(
        self,
        memory_bnw: Tensor,
        tokens: int | Tensor,
        projected: tuple[Hashable, Sequence[Tensor]] | None = None,
        *,
        entered: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take the memories after `tokens` more tokens (an int, or a number per row, [b]).

        entered: where other documents may have begun among them, the rows' lengths and documents now, each [b].
        """
        self.memory = memory_bnw.detach().to(self.memory.dtype)
        if entered is not None:
            self.lengths, self.number = entered
        else:
            self.lengths = self.lengths + tokens
        level = self._equal is not None and entered is None and isinstance(tokens, int)
        self._equal = self._equal + tokens if level else None  # type: ignore[operator]
        self._projected = None if projected is None else (projected[0], tuple(projected[1]))

    def mark(self) -> tuple[Any, ...]:
        """What `rollback` needs to forget later tokens."""
        return self.memory, self.lengths, self.number, self._equal, self._projected

    def rollback(self, mark: tuple[Any, ...]) -> None:
        """Go back to a mark. (A length to crop to would not do: memories that left the window are gone.)"""
        self.memory, self.lengths, self.number, self._equal, self._projected = mark

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was (beam search); rows may be repeated or left out."""
        for name in ("memory", "lengths", "number"):
            setattr(self, name, getattr(self, name).index_select(0, index))
        if self._projected is not None:
            made_by, kept = self._projected
            self._projected = made_by, tuple(t.index_select(0, index) for t in kept)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the given rows (a boolean [b], or indices), or all: the next token begins a document."""
        self._projected = None
        if rows is None:
            self.memory, self.lengths, self._equal = torch.zeros_like(self.memory), torch.zeros_like(self.lengths), 0
            self.number = torch.full_like(self.number, NONE)
            return
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        self.memory = self.memory.index_fill(0, index, 0.0)
        self.lengths = self.lengths.index_fill(0, index, 0)
        self.number = self.number.index_fill(0, index, NONE)
        self._equal = None

    def state_dict(self) -> dict[str, Tensor]:
        """Memories, lengths and documents, as tensors that safetensors can write; keys and values are made anew."""
        return {"memory": self.memory, "lengths": self.lengths, "number": self.number}

    def load_state_dict(self, held: Mapping[str, Tensor]) -> None:
        """Take what `state_dict` gave. Raises `ValueError` when it is of other sizes."""
        if held["memory"].shape != self.memory.shape:
            raise ValueError(
                f"FeedbackState: has memories {tuple(self.memory.shape)}, what is to be loaded has "
                f"{tuple(held['memory'].shape)}"
            )
        self.memory, self.lengths, self.number = held["memory"], held["lengths"], held["number"]
        shortest, longest = (int(n) for n in self.lengths.aminmax())
        self._equal, self._projected = (shortest if shortest == longest else None), None
