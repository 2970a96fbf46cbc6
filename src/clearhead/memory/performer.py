"""A performer's recurrent state: sums over the keys so far, of constant size however long the text is.

    S = sum_j phi(k_j) [v_j, 1]         out_i = phi(q_i) S

(arXiv 2009.14794, eq. 11), held as S = total e^level with the running maximum of the keys' log shifts as level. LASER
sums exp(v_j - high) with a running maximum of the values for each channel. Rows of a batch take up their own tokens
only, so a left-padded batch of prompts decodes as each prompt would alone.

Legend: b batch, g key/value heads, n new tokens, e value dim, r features.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clearhead.attention.mask import Mask
from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.attention.spec import AttentionSpec
from clearhead.attention.terms import FAR, Causal, KeyRange
from clearhead.kernels.features import FeatureMap
from clearhead.kernels.linear import Carry, Problem, scan
from clearhead.memory.cache import KVCache


class PerformerState:
    """Sums of one layer. Make it with `PerformerState.allocate`; `attend(..., state=state)` reads and takes up.

    It belongs to one projection: sums made with other random features mean nothing.
    """

    def __init__(self, carry: Carry, high: Tensor, low: Tensor) -> None:
        self.carry = carry
        self.high, self.low = high, low  # [b, g, e]: largest and smallest value of each channel; LASER only
        self.lengths = torch.zeros(carry.level.shape[0], dtype=torch.int64, device=carry.level.device)

    @classmethod
    def allocate(
        cls,
        batch: int,
        kv_heads: int,
        features: int,
        value_dim: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> PerformerState:
        """Empty sums over `features` features (`Performer.width` of the spec; the head dim without a projection).

        Half precision is summed in float32.
        """
        if min(batch, kv_heads, features, value_dim) < 1:
            raise ValueError(
                "PerformerState.allocate: batch, kv_heads, features and value_dim must be at least 1, got "
                f"{batch}, {kv_heads}, {features}, {value_dim}"
            )
        dtype = working_dtype(dtype)
        total = torch.zeros(batch, kv_heads, features, value_dim + 1, dtype=dtype, device=device)
        level = torch.full((batch, kv_heads), -math.inf, dtype=dtype, device=device)
        high = torch.full((batch, kv_heads, value_dim), -math.inf, dtype=dtype, device=device)
        return cls(Carry(total, level), high, -high)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the sums."""
        return self.carry.total.dtype

    @property
    def capacity(self) -> int:
        """Tokens that a row can take up: no bound."""
        return FAR

    @property
    def bytes(self) -> int:
        """Size of the sums; it does not grow."""
        return sum(t.numel() * t.element_size() for t in (self.carry.total, self.carry.level, self.high, self.low))

    def append(self, key: Tensor, value: Tensor, mask: Mask) -> tuple[Tensor, Tensor, Mask]:
        """Raise `ValueError`: there are no keys to return."""
        raise ValueError("PerformerState: it holds sums, not keys; only attend with performer weights can use it")

    def check(self, spec: AttentionSpec, key: Tensor, value: Tensor, mask: Mask) -> None:
        """Raise `ValueError` when a call does not fit this state, with what was expected."""
        b, g, _, e = self.carry.total.shape
        if torch.is_grad_enabled() and (key.requires_grad or value.requires_grad):
            raise ValueError(
                "PerformerState: it carries no gradients; decode under torch.no_grad() or inference_mode()"
            )
        if key.shape[:2] != (b, g) or value.shape[-1] != e - 1:
            raise ValueError(
                f"PerformerState: holds {b} rows, {g} key/value heads and values of width {e - 1}, got keys of shape "
                f"{tuple(key.shape)} and values of shape {tuple(value.shape)}"
            )
        if working_dtype(key.dtype) == torch.float64 and self.dtype != torch.float64:
            raise TypeError(f"PerformerState: holds {self.dtype}, got {key.dtype}; allocate it with the model's dtype")
        causal = any(isinstance(term, Causal) for term in mask.terms)
        others = [term for term in mask.terms if not isinstance(term, Causal | KeyRange)]
        if not causal or others or mask.offset is not None:
            raise ValueError(
                "PerformerState: the mask must be causal and may hold a key range over the new tokens, nothing else; "
                "where the tokens stand comes from the state"
            )

    def step(self, call: Any, features: FeatureMap, laser: bool, chunk: int) -> Tensor:
        """Answer the new queries [b, h, n, d], which see the sums and each other causally, and take up the keys."""
        return without_autocast(self._step)(call, features, laser, chunk)

    def _step(self, call: Any, features: FeatureMap, laser: bool, chunk: int) -> Tensor:
        b, g, r, _ = self.carry.total.shape
        n = call.k.shape[2]
        if features.width != r:
            raise ValueError(f"PerformerState: holds sums over {r} features, the projection makes {features.width}")
        valid = torch.ones(b, n, dtype=torch.bool, device=call.k.device)
        if call.unseen is not None:
            valid = ~call.unseen[:, 0, :, 0].expand(b, n)
        values, carry = call.v.to(self.dtype), self.carry
        if laser:
            carry, values = self._shifted(values, valid)
        root = math.sqrt(call.scale)
        q = (call.q.to(self.dtype) * root).unflatten(1, (g, -1))
        v1 = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        problem = Problem(q, call.k.to(self.dtype) * root, v1, features, 0, valid, None, chunk)
        out, z, after = scan(problem, carry)
        if features.positive and bool((z < 0.0).any()):
            raise ValueError(
                f"PerformerState: all that a query sees underflows in {self.dtype}; "
                + ("the scores are too large for sums" if self.dtype == torch.float64 else "allocate it in float64")
            )
        if laser:
            some = (z != 0.0).unsqueeze(-1)
            read = torch.where(some, out, 1.0).log() + self.high[:, :, None, None]
            out = torch.where(some, read, 0.0)
        self.carry, self.lengths = after, self.lengths + valid.sum(dim=-1)
        return out.flatten(1, 2)

    def _shifted(self, values: Tensor, valid: Tensor) -> tuple[Carry, Tensor]:
        """The sums and exp(values) with the largest value so far taken out; what is hidden is 1."""
        hidden = ~valid[:, None, :, None]
        high, low = (
            torch.maximum(self.high, values.masked_fill(hidden, -math.inf).amax(dim=2)),
            torch.minimum(self.low, values.masked_fill(hidden, math.inf).amin(dim=2)),
        )
        tokens = int(self.lengths.max()) + values.shape[2]
        spread = float((high - low).masked_fill(high == -math.inf, 0.0).amax())
        info = torch.finfo(self.dtype)
        if spread > math.log(info.eps) - math.log(info.tiny) - math.log(max(tokens, 1)):
            raise ValueError(
                f"laser on performer: values spread over {spread:.0f} in one channel, more than sums in {self.dtype} "
                "can hold; " + ("scale them down" if self.dtype == torch.float64 else "allocate the state in float64")
            )
        safe = high.masked_fill(high == -math.inf, 0.0)
        ones = torch.ones_like(safe[..., :1])
        total = self.carry.total * torch.cat([(self.high - safe).exp(), ones], dim=-1).unsqueeze(2)
        self.high, self.low = high, low
        return replace(self.carry, total=total), (values - safe.unsqueeze(2)).masked_fill(hidden, 0.0).exp()

    def mark(self) -> Any:
        """What `rollback` needs to forget later tokens: the sums are replaced, never written to."""
        return self.carry, self.high, self.low, self.lengths

    def rollback(self, mark: Any) -> None:
        """Forget everything taken up since `mark`."""
        self.carry, self.high, self.low, self.lengths = mark

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was (beam search)."""
        total, level, self.high, self.low, self.lengths = (
            t.index_select(0, index) for t in (self.carry.total, self.carry.level, self.high, self.low, self.lengths)
        )
        self.carry = Carry(total, level)

    def crop(self, length: int) -> None:
        """Raise `ValueError`, unless no row is longer: a sum cannot say what its last terms were."""
        if int(self.lengths.max()) > length:
            raise ValueError(
                "PerformerState.crop: a sum over tokens cannot forget some of them; keep a mark() and roll back to it, "
                "or use a KVCache"
            )

    def reset(self, rows: Tensor | None = None) -> None:
        """Empty the given rows (a boolean [b], or indices), or all."""
        if rows is None:
            rows = torch.ones_like(self.lengths, dtype=torch.bool)
        index = rows.nonzero().flatten() if rows.dtype == torch.bool else rows
        self.carry = Carry(self.carry.total.index_fill(0, index, 0.0), self.carry.level.index_fill(0, index, -math.inf))
        self.high, self.low = self.high.index_fill(0, index, -math.inf), self.low.index_fill(0, index, math.inf)
        self.lengths = self.lengths.index_fill(0, index, 0)


Cache = KVCache | PerformerState
"""What one layer of a model remembers."""
