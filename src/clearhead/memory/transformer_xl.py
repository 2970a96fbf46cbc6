"""Transformer-XL's memory (arXiv 1901.02860, section 3.2): each layer's own inputs of the last tokens, detached.

    keys and values of layer l = projections of [memory_l ; x_l],    then memory_l <- last M_l of [memory_l ; x_l]

What is kept are inputs, not keys and values: these are made anew with the weights of the moment, which therefore get a
gradient through the memory; the inputs get none. Every layer has a length of its own (`layout.py`).

A row holds the last tokens of its stream, the newest on the right, and for each of these slots the document it
belongs to and its place in it. A query sees the slots of its own document only, so nothing has to be emptied where a
document ends. All numbers are the stream's, positions are distances: nothing grows with the tokens read.

Shapes: b batch, n tokens of a call, m slots, w width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

NONE = torch.iinfo(torch.int64).min  # no segment number: the next token begins a document


@dataclass(frozen=True, eq=False)
class Entered:
    """Where the tokens of one call stand: made by `SegmentMemory.enter`, taken by `push`."""

    document: Tensor
    """[b, n] int64, the row's running number of the document; -1 = padding."""
    place: Tensor
    """[b, n] int64, 0-based place in the document."""
    number: Tensor
    """[b, n] int64, as the caller numbers its documents."""
    valid: Tensor | None
    """[b, n] bool, real tokens first; None = no padding."""
    plain: bool
    """All of it, and all that is held, is one document without padding: nothing has to be masked."""


class SegmentMemory:
    """The memory of all layers: `model.new_memory(batch)` makes it, `model(tokens, memory=...)` reads and fills it."""

    def __init__(
        self,
        lengths: Sequence[int],
        batch: int,
        width: int,
        *,
        windowed: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        self.lengths = tuple(lengths)
        """Tokens that each layer remembers at most, the lowest layer first."""
        self.windowed = windowed
        """Whether a query of layer l sees no further than lengths[l] back, in its own segment too."""
        if batch < 1 or width < 1 or not self.lengths or min(self.lengths) < 0:
            raise ValueError(
                f"SegmentMemory: expected a batch and a width of at least 1 and lengths of at least 0, got {batch}, "
                f"{width} and {self.lengths}"
            )
        self.inputs = [torch.zeros(batch, 0, width, dtype=dtype, device=device) for _ in self.lengths]
        """Of each layer, [b, m, w] with m growing to its length."""
        self.document = torch.zeros(batch, 0, dtype=torch.int64, device=device)
        """[b, slots] running number of the document in each slot of the longest layer; -1 = an empty slot."""
        self.place = torch.zeros_like(self.document)
        """[b, slots] 0-based place of the slot's token in its document."""
        self.current = torch.zeros(batch, dtype=torch.int64, device=device)
        """[b] running number of the last token's document."""
        self.read = torch.zeros_like(self.current)
        """[b] tokens of that document that were read."""
        self.number = torch.full_like(self.current, NONE)
        """[b] what the caller calls that document."""
        self.plain = True
        """Every slot of a row belongs to the document that goes on."""

    # -- what it holds ------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """Rows."""
        return self.current.shape[0]

    @property
    def held(self) -> Tensor:
        """Slots of each row that hold a token, in the longest layer, [b] int64."""
        return (self.document >= 0).sum(dim=1)

    @property
    def bytes(self) -> int:
        """Size of the held layer inputs; once all are full `layout.memory_bytes`.

        The documents and places, 16 bytes for a slot of the longest layer, are not counted.
        """
        return sum(x.numel() * x.element_size() for x in self.inputs)

    # -- one call -----------------------------------------------------------------------------------------------------

    def enter(self, tokens: int, segments: Tensor | None = None, valid: Tensor | None = None) -> Entered:
        """Place the next `tokens` tokens of each row in their documents; nothing is kept before `push`.

        segments: [b, n] int; the first token goes on with the row's document when its number is that of the last token
            that was pushed. None: the document goes on.
        valid: [b, n] bool, the real tokens of each row first.
        """
        fresh_b1 = (self.number == NONE)[:, None]
        number = torch.where(fresh_b1, 0, self.number[:, None]).expand(-1, tokens)
        if segments is None:
            changes = torch.zeros_like(number, dtype=torch.bool)
            changes[:, :1] |= fresh_b1
        else:
            number = segments.to(torch.int64)
            changes = number != torch.cat((self.number[:, None], number[:, :-1]), dim=1)
        document = self.current[:, None] + changes.cumsum(dim=1)
        index = torch.arange(tokens, device=document.device).expand_as(document)
        begin = torch.where(changes, index, -1).cummax(dim=1).values if tokens else index
        place = torch.where(begin < 0, self.read[:, None] + index, index - begin)
        if valid is not None:
            document = document.masked_fill(~valid, -1)
        return Entered(document, place, number, valid, self.plain and segments is None and valid is None)

    def push(self, inputs: Sequence[Tensor], entered: Entered) -> None:
        """Take each layer's inputs of a call, [b, n, w], and let go of the oldest."""
        if len(inputs) != len(self.lengths):
            raise ValueError(f"SegmentMemory: has {len(self.lengths)} layers, got the inputs of {len(inputs)}")
        if not entered.document.shape[1]:
            return
        document = torch.cat((self.document, entered.document), dim=1)
        order: Tensor | None = None
        if entered.valid is not None:  # the padding of a row goes to its left, where it is let go of first
            order = (document >= 0).to(torch.int8).argsort(dim=1, stable=True)
        self.inputs = [
            _last(old, new.detach().to(old.dtype), length, document, order)
            for old, new, length in zip(self.inputs, inputs, self.lengths, strict=True)
        ]
        slots = min(max(self.lengths), document.shape[1])
        self.place = _last(self.place, entered.place, slots, document, order)
        self.document = _last(self.document, entered.document, slots, document, order)
        self._advance(entered)
        self.plain = entered.plain

    def _advance(self, entered: Entered) -> None:
        if entered.valid is None:
            self.current, self.number = entered.document[:, -1].clone(), entered.number[:, -1].clone()
            self.read = entered.place[:, -1] + 1
            return
        count_b1 = entered.valid.sum(dim=1, keepdim=True)
        last_b1, some_b = (count_b1 - 1).clamp_min(0), count_b1[:, 0] > 0
        ends = (x.gather(1, last_b1)[:, 0] for x in (entered.document, entered.number, entered.place + 1))
        held = (self.current, self.number, self.read)
        self.current, self.number, self.read = (
            torch.where(some_b, end, old) for end, old in zip(ends, held, strict=True)
        )

    # -- rows and lengths ---------------------------------------------------------------------------------------------

    def reset(self, rows: Tensor | None = None) -> None:
        """Forget the given rows (a boolean [b], or indices), or all: their next token begins a document."""
        if rows is None:
            self.inputs = [x[:, :0].clone() for x in self.inputs]
            self.document, self.place = self.document[:, :0].clone(), self.place[:, :0].clone()
            self.number, self.plain = torch.full_like(self.number, NONE), True
            return
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        self.document = self.document.index_fill(0, index, -1)
        self.number = self.number.index_fill(0, index, NONE)
        self.plain = False

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was; rows may be repeated or left out."""
        self.inputs = [x.index_select(0, index) for x in self.inputs]
        for name in ("document", "place", "current", "read", "number"):
            setattr(self, name, getattr(self, name).index_select(0, index))

    def with_lengths(self, lengths: Sequence[int], *, windowed: bool | None = None) -> SegmentMemory:
        """The same memory with other lengths: what does not fit is let go of, what is missing comes with more tokens.

        A layer that held less than another's slots goes on from there, so lengthen an empty memory to compare lengths.
        """
        if len(lengths) != len(self.lengths):
            raise ValueError(f"SegmentMemory: has {len(self.lengths)} layers, got {len(lengths)} lengths")
        made = self.clone()
        made.lengths, made.windowed = tuple(lengths), self.windowed if windowed is None else windowed
        made.inputs = [
            x[:, x.shape[1] - min(x.shape[1], n) :].clone() for x, n in zip(made.inputs, lengths, strict=True)
        ]
        slots = min(max(made.lengths), made.document.shape[1])
        made.document = made.document[:, made.document.shape[1] - slots :].clone()
        made.place = made.place[:, made.place.shape[1] - slots :].clone()
        return made

    def clone(self) -> SegmentMemory:
        """A copy that shares nothing."""
        made = SegmentMemory(self.lengths, self.batch, self.inputs[0].shape[-1], windowed=self.windowed)
        made.load_state_dict({name: t.clone() for name, t in self.state_dict().items()})
        return made

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> SegmentMemory:
        """A copy on another device, or with layer inputs of another dtype."""
        made = self.clone()
        made.load_state_dict({name: t.to(device) for name, t in made.state_dict().items()})
        if dtype is not None:
            made.inputs = [x.to(dtype) for x in made.inputs]
        return made

    # -- on disk ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All that is held, as tensors that safetensors can write; lengths are the layout's and are not in it."""
        held = {f"inputs.{layer}": x for layer, x in enumerate(self.inputs)}
        held |= {name: getattr(self, name) for name in ("document", "place", "current", "read", "number")}
        return held | {"plain": torch.tensor(int(self.plain))}

    def load_state_dict(self, held: dict[str, Tensor]) -> None:
        """Take what `state_dict` gave. Raises `ValueError` when it is of other layers or longer than the lengths."""
        layers = len(self.lengths)
        found = sum(name.startswith("inputs.") for name in held)
        if found != layers:
            raise ValueError(f"SegmentMemory: has {layers} layers, what is to be loaded has {found}")
        for layer, length in enumerate(self.lengths):
            if held[f"inputs.{layer}"].shape[1] > length:
                raise ValueError(
                    f"SegmentMemory: layer {layer} remembers {length} tokens, what is to be loaded has "
                    f"{held[f'inputs.{layer}'].shape[1]}; load it with its own lengths, then use with_lengths"
                )
        self.inputs = [held[f"inputs.{layer}"] for layer in range(layers)]
        for name in ("document", "place", "current", "read", "number"):
            setattr(self, name, held[name])
        self.plain = bool(held["plain"])


def _last(old: Tensor, new: Tensor, length: int, document: Tensor, order: Tensor | None) -> Tensor:
    """The last `length` slots of [old ; new] in a tensor of their own; `order` sorts the slots of all that is held."""
    held, n = old.shape[1], new.shape[1]
    keep = min(length, held + n)
    if order is None:
        if keep <= n:
            return new[:, n - keep :].clone()
        return torch.cat((old[:, held + n - keep :], new), dim=1)
    slots = document.shape[1]
    if held + n < slots:  # a shorter layer: the order of its own slots
        order = (document[:, slots - held - n :] >= 0).to(torch.int8).argsort(dim=1, stable=True)
    order = order[:, held + n - keep :]
    both = torch.cat((old, new), dim=1)
    return both.gather(1, order[..., None].expand(-1, -1, both.shape[-1]) if both.dim() == 3 else order)
