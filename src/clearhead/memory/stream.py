"""Decoding with a Transformer-XL memory: keys and values inside the segment, layer inputs beyond it, bounded for ever.

Training reads a stream in segments, and what a query sees hangs on where its segment began (range=memory). Decoding
therefore keeps the same segments: inside one, keys and values are kept as in any cache, those of the memory made once
at its beginning; at its end the segment's layer inputs go into the memory and the keys are let go of. So each token
gets exactly what it gets in training, and no layer holds more than its length and one segment.
With range=window it makes no difference where segments begin.

Shapes: b batch, g key/value heads, n tokens of a call, s keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearhead.attention.mask import Mask
from clearhead.memory.transformer_xl import Entered, SegmentMemory


class SegmentKeys:
    """Keys and values of one layer since its segment began, the memory's before them; `attend` appends and reads.

    The call's mask speaks of all of them already.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.length = 0

    def append(self, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        """Store [b, g, n, .] keys and values; return all that is held, and `mask`."""
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("SegmentKeys: a stream carries no gradients; decode under torch.no_grad()")
        if self.key is None or self.value is None:
            self.key, self.value = (x.new_zeros(*x.shape[:2], self.capacity, x.shape[-1]) for x in (key, value))
        end = self.length + key.shape[2]
        self.key[:, :, self.length : end] = key
        self.value[:, :, self.length : end] = value
        self.length = end
        return self.key[:, :, :end], self.value[:, :, :end], mask

    def mark(self) -> int:
        """What `rollback` needs."""
        return self.length

    def rollback(self, mark: int) -> None:
        """Forget everything appended since `mark`."""
        self.length = mark

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, index), self.value.index_select(0, index)


class SegmentStream:
    """What a decoder with memory remembers between calls; `model.new_stream(batch)` makes it, and
    `model(tokens, state=stream)` reads and fills it. All rows go in step, a document each.
    """

    def __init__(self, memory: SegmentMemory, segment: int) -> None:
        if segment < 1:
            raise ValueError(f"SegmentStream: expected a segment of at least 1 token, got {segment}")
        self.memory, self.segment = memory, segment
        self.keys: list[SegmentKeys] = []
        self.inputs: list[Tensor] = []
        self.entered: Entered | None = None
        self.begin()

    @property
    def open(self) -> int:
        """Tokens of the segment that was begun."""
        return 0 if self.entered is None else self.entered.document.shape[1]

    @property
    def bytes(self) -> int:
        """Size of everything held: keys and values, the open segment's layer inputs, and the memory's."""
        kept = [t for keys in self.keys for t in (keys.key, keys.value) if t is not None]
        return self.memory.bytes + sum(t.numel() * t.element_size() for t in [*kept, *self.inputs])

    def begin(self) -> None:
        """Begin a segment."""
        self.keys = [SegmentKeys(x.shape[1] + self.segment) for x in self.memory.inputs]
        self.inputs, self.entered = [], None

    def enter(self, tokens: int) -> Entered:
        """Place the next tokens of the open segment; `take` keeps them."""
        every = self.memory.enter(self.open + tokens)
        return _part(every, slice(self.open, None))

    def take(self, inputs: list[Tensor], entered: Entered) -> None:
        """Keep the layer inputs of a call, and close the segment when it is full."""
        parts = zip(self.inputs, inputs, strict=True) if self.inputs else ((x[:, :0], x) for x in inputs)
        self.inputs = [torch.cat((old, new.detach()), dim=1) for old, new in parts]
        self.entered = self.memory.enter(self.open + entered.document.shape[1])
        if self.open == self.segment:
            self.memory.push(self.inputs, self.entered)
            self.begin()

    def places(self) -> tuple[Tensor, Tensor]:
        """Documents and places of the memory's slots and of the open segment, [b, s] each."""
        memory = self.memory
        if self.entered is None:
            return memory.document, memory.place
        return (
            torch.cat((memory.document, self.entered.document), dim=1),
            torch.cat((memory.place, self.entered.place), dim=1),
        )

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; rows may be repeated or left out."""
        self.memory.reorder(index)
        for keys in self.keys:
            keys.reorder(index)
        self.inputs = [x.index_select(0, index) for x in self.inputs]
        if self.entered is not None:
            self.entered = self.memory.enter(self.open)

    def reset(self) -> None:
        """Forget everything: the next tokens begin a document."""
        self.memory.reset()
        self.begin()


def _part(entered: Entered, part: slice) -> Entered:
    return Entered(
        entered.document[:, part], entered.place[:, part], entered.number[:, part], entered.valid, entered.plain
    )
