"""What a decoder remembers between calls: one key/value cache per layer."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clearhead.memory.cache import KVCache


@dataclass(frozen=True, eq=False)
class DecoderState:
    """Caches that `model(tokens, state=state)` reads and appends to, in place.

    A row's length is the number of its valid tokens so far, so the next token's position in its document is that
    length: rows of unequal length (left-padded prompts) each go on where they stand.
    """

    caches: tuple[KVCache, ...]

    @property
    def lengths(self) -> Tensor:
        """Valid tokens held per row, [b] int64."""
        return self.caches[0].lengths

    @property
    def capacity(self) -> int:
        """Tokens that a row can hold."""
        return self.caches[0].capacity

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was (beam search)."""
        for cache in self.caches:
            cache.reorder(index)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row."""
        for cache in self.caches:
            cache.crop(length)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the given rows (a boolean [b], or indices), or all."""
        for cache in self.caches:
            cache.reset(rows)
