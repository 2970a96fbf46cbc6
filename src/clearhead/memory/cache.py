"""A static key/value cache: buffers allocated once, and a length per batch row.

Rows may differ in length: padding of a prefill is not stored, so a left-padded batch of prompts decodes as each prompt
would alone. Keys are stored as attention uses them (after rotary positions), values after their temperature.

Shapes: b batch, g key/value heads, n new tokens, c capacity, d head dim of keys, e of values.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearhead.attention.mask import Mask
from clearhead.attention.terms import Causal, KeyRange


class KVCache:
    """Keys and values of one layer. Make it with `KVCache.allocate`; `attend(..., state=cache)` appends and reads.

    While every row holds the same number of tokens the length is known on the host and kernels see no padding. Rows of
    unequal length, and compiled graphs, use the tensor `lengths` [b] and the whole buffer instead.
    """

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.key, self.value = (
            key,
            value,
        )  # [b, g, c + 1, .]: the last slot swallows padding, and is never read
        self.lengths = torch.zeros(key.shape[0], dtype=torch.int64, device=key.device)
        self._equal: int | None = 0  # the common length, while there is one
        self._bound = 0  # no row is longer than this; exact while `_equal` is known

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        capacity: int,
        head_dim: int,
        *,
        value_dim: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> KVCache:
        """Buffers for `capacity` tokens a row, zeroed (what is never read may still be multiplied by a zero weight)."""
        if min(batch, kv_heads, capacity, head_dim) < 1:
            raise ValueError(
                "KVCache.allocate: batch, kv_heads, capacity and head_dim must be at least 1, got "
                f"{batch}, {kv_heads}, {capacity}, {head_dim}"
            )
        shape = (batch, kv_heads, capacity + 1)
        return cls(
            torch.zeros(*shape, head_dim, dtype=dtype, device=device),
            torch.zeros(*shape, head_dim if value_dim is None else value_dim, dtype=dtype, device=device),
        )

    @property
    def capacity(self) -> int:
        """Tokens a row can hold."""
        return self.key.shape[2] - 1

    @property
    def bytes(self) -> int:
        """Size of the buffers."""
        return sum(t.numel() * t.element_size() for t in (self.key, self.value))

    def append(self, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        """Store [b, g, n, .] keys and values; return all that is held, and `mask` told over it.

        `mask` may hold causality and windows (their offset becomes each row's length before the call) and a key range
        over the n new tokens, whose tokens outside are not stored. Raises `ValueError` for other masks, for a full
        cache, and under autograd: a cache does not carry gradients.
        """
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError("KVCache: a cache carries no gradients; decode under torch.no_grad() or inference_mode()")
        if key.shape[:2] != self.key.shape[:2] or key.shape[-1] != self.key.shape[-1]:
            raise ValueError(
                f"KVCache: holds [batch, kv_heads, ., head_dim] = {tuple(self.key.shape[:2])} x {self.key.shape[-1]}, "
                f"got keys of shape {tuple(key.shape)}"
            )
        if value.shape[-1] != self.value.shape[-1]:
            raise ValueError(f"KVCache: holds values of width {self.value.shape[-1]}, got shape {tuple(value.shape)}")
        if key.dtype != self.key.dtype:
            raise TypeError(f"KVCache: holds {self.key.dtype}, got {key.dtype}; allocate it with the model's dtype")
        ranges = [term for term in mask.terms if isinstance(term, KeyRange)]
        others = [term for term in mask.terms if not isinstance(term, KeyRange)]
        if mask.offset is not None or any(term.tensors() for term in others):
            raise ValueError(
                "KVCache: with a cache the mask may hold causality, windows and a key range over the new tokens; "
                "offsets come from the cache, dense masks and segments are not supported"
            )
        if any(isinstance(term, Causal) and term.prefix for term in others):
            raise ValueError("KVCache: a causal prefix is not supported with a cache")
        if not ranges and self._equal is not None and not torch.compiler.is_compiling():
            return self._append_equal(key, value, Mask(tuple(others)))
        return self._append_ragged(key, value, Mask(tuple(others)), ranges)

    def _append_equal(self, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        assert self._equal is not None
        before, after = self._equal, self._equal + key.shape[2]
        self._require(after)
        self.key[:, :, before:after] = key
        self.value[:, :, before:after] = value
        self._equal = self._bound = after
        self.lengths = torch.full_like(self.lengths, after)
        return self.key[:, :, :after], self.value[:, :, :after], Mask(mask.terms, before)

    def _append_ragged(
        self, key: Tensor, value: Tensor, mask: Mask, ranges: list[KeyRange]
    ) -> tuple[Tensor, Tensor, Mask]:
        b, _, n, _ = key.shape
        start = torch.zeros_like(self.lengths)
        end = torch.full_like(self.lengths, n)
        for term in ranges:
            start = start if term.start is None else torch.maximum(start, term.start.expand(b).to(start))
            end = end if term.end is None else torch.minimum(end, term.end.expand(b).to(end))
        token = torch.arange(n, device=key.device)
        valid_bn = (token >= start[:, None]) & (token < end[:, None])
        if not torch.compiler.is_compiling():
            self._bound += n
            if self._bound > self.capacity:  # the bound counts padding: look at the true lengths before refusing
                self._bound = int((self.lengths + valid_bn.sum(-1)).max())
                self._require(self._bound)
        # Padding goes to the last slot. Past the capacity the index is out of range, and indexing raises.
        slot_bn = self.lengths[:, None] + token - start[:, None]
        slot_bn = torch.where(slot_bn < self.capacity, slot_bn, self.capacity + 1)
        slot_bn = torch.where(valid_bn, slot_bn, self.capacity)
        row = torch.arange(b, device=key.device)[:, None]
        # Padding may hold anything, even NaN, and its slot must stay harmless.
        self.key[row, :, slot_bn] = key.transpose(1, 2).masked_fill(~valid_bn[..., None, None], 0.0)
        self.value[row, :, slot_bn] = value.transpose(1, 2).masked_fill(~valid_bn[..., None, None], 0.0)
        offset = self.lengths - start
        self.lengths = self.lengths + valid_bn.sum(-1)
        self._equal = None
        held = self.capacity if torch.compiler.is_compiling() else self._bound
        told = Mask((*mask.terms, KeyRange(None, self.lengths)), offset)
        return self.key[:, :, :held], self.value[:, :, :held], told

    def _require(self, tokens: int) -> None:
        if tokens > self.capacity:
            raise ValueError(
                f"KVCache: full: {tokens} tokens do not fit a capacity of {self.capacity}; allocate more, or crop"
            )

    def mark(self) -> tuple[Tensor, int | None, int]:
        """What `rollback` needs to forget later appends."""
        return self.lengths.clone(), self._equal, self._bound

    def rollback(self, mark: tuple[Tensor, int | None, int]) -> None:
        """Forget everything appended since `mark` (what stands beyond a row's length is never read)."""
        self.lengths, self._equal, self._bound = mark

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was (beam search)."""
        self.key, self.value = self.key.index_select(0, index), self.value.index_select(0, index)
        self.lengths = self.lengths.index_select(0, index)

    def crop(self, length: int) -> None:
        """Forget all but the first `length` tokens of each row."""
        if length < 0:
            raise ValueError(f"KVCache.crop: expected a length of at least 0, got {length}")
        self.lengths = self.lengths.clamp(max=length)
        self._bound = min(self._bound, length)
        self._equal = None if self._equal is None else min(self._equal, length)

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the given rows (a boolean [b], or indices), or all."""
        if rows is None:
            self.lengths = torch.zeros_like(self.lengths)
            self._equal = self._bound = 0
            return
        self.lengths = self.lengths.index_fill(0, rows.nonzero().flatten() if rows.dtype == torch.bool else rows, 0)
        self._equal = None
