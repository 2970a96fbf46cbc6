"""What a model remembers between calls: one key/value cache per layer, and the source that it has read."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from clearhead.layers.cross_attention import SourceCache
from clearhead.memory.performer import Cache


@dataclass(frozen=True, eq=False)
class DecoderState:
    """Caches that `model(tokens, state=state)` reads and appends to, in place.

    A row's length is the number of its valid tokens so far, so the next token's position in its document is that
    length: rows of unequal length (left-padded prompts) each go on where they stand.
    """

    caches: tuple[Cache, ...]

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


class SourceMemory:
    """What a seq2seq decoder keeps of its source: the keys and values of each layer, and which of them are real."""

    def __init__(self, layers: int) -> None:
        self.layers = tuple(SourceCache() for _ in range(layers))
        self.tokens = 0
        """Length of the source with its padding; 0 = none was read yet."""
        self.valid: Tensor | None = None
        """[b, s] bool; None = no padding."""

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        for held in self.layers:
            held.reorder(index)
        self.valid = None if self.valid is None else self.valid.index_select(0, index)

    def forget(self) -> None:
        """Make room for another source."""
        for held in self.layers:
            held.source = None
        self.tokens, self.valid = 0, None


@dataclass(frozen=True, eq=False)
class Seq2SeqState(DecoderState):
    """The decoder's caches, and the source, which is read once: at the first call."""

    source: SourceMemory

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; rows may be repeated or left out."""
        super().reorder(index)
        self.source.reorder(index)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty all rows and forget the source. Raises `ValueError` for some rows: a source is read for all at once."""
        if rows is not None:
            raise ValueError("Seq2SeqState.reset: a source is read for all rows at once; reset all, or use new_state")
        super().reset()
        self.source.forget()
