"""Additive position terms, yielded block by block with their own gradient, so that no N x M tensor need exist.

A bias is added to the scaled scores, before the weights. Shapes: b batch, h query heads, n query rows, m keys.
`accumulate` is the hand-written gradient: kernels run below autograd and call it once per block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clearhead.attention.terms import Rows, Term, narrow_dim


class Bias:
    """Base. A subclass names itself in `BIASES`, so that kernels can rebuild it from its text and tensors."""

    code: str

    def tensors(self) -> list[Tensor]:
        """The parameters, in the order `decode` takes them."""
        raise NotImplementedError

    def numbers(self) -> tuple[int, ...]:
        """The whole numbers that `decode` takes after the tensors."""
        return ()

    @property
    def text(self) -> str:
        """Name and numbers: with `tensors`, all that `read_bias` needs to make the bias again."""
        return ":".join([self.code, *map(str, self.numbers())])

    @classmethod
    def decode(cls, tensors: list[Tensor], *numbers: int) -> Bias:
        """Inverse of `tensors` and `numbers`."""
        raise NotImplementedError

    def with_tensors(self, tensors: list[Tensor]) -> Bias:
        """The same bias on other tensors (views of its own for some heads, say)."""
        return type(self).decode(tensors, *self.numbers())

    @staticmethod
    def narrow(tensors: list[Tensor], batch: slice, heads: slice) -> list[Tensor]:
        """Views of the parameters, or of their gradients, for some batch rows and query heads."""
        raise NotImplementedError

    def within(self, terms: Sequence[Term]) -> Bias:
        """The same bias, told by a call's mask where documents begin; only FIRE asks."""
        return self

    def block(self, rows: Rows) -> Tensor:
        """Values for a block, broadcastable to [b, h, n', m']."""
        raise NotImplementedError

    def accumulate(self, gradients: list[Tensor], rows: Rows, gradient_bhnm: Tensor) -> None:
        """Add this block's gradient to `gradients` (same order and shapes as `tensors`)."""
        raise NotImplementedError

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """Raise `ValueError` when the bias does not fit queries [b, h, n, .] and m keys."""
        raise NotImplementedError

    @property
    def requires_grad(self) -> bool:
        """Whether a parameter of the bias wants a gradient."""
        return any(t.requires_grad for t in self.tensors())


@dataclass(frozen=True, eq=False)
class ALiBi(Bias):
    """ALiBi (Press et al., arXiv 2108.12409): -slope[h] * |q - k|, the distance in positions.

    The paper is causal, where |q - k| = q - k; the symmetric form serves bidirectional calls. `slopes` is [h].
    """

    slopes: Tensor
    code = "alibi"

    @staticmethod
    def default_slopes(heads: int, device: torch.device | str | None = None) -> Tensor:
        """The paper's geometric sequence; for a head count that is no power of two, its interleaved extension."""

        def sequence(count: int) -> list[float]:
            return [2.0 ** (-8.0 * (i + 1) / count) for i in range(count)]

        below = 2 ** math.floor(math.log2(heads))
        values = sequence(below) + sequence(2 * below)[0::2][: heads - below]
        return torch.tensor(values, device=device)

    def tensors(self) -> list[Tensor]:
        """See `Bias.tensors`."""
        return [self.slopes]

    @classmethod
    def decode(cls, tensors: list[Tensor], *numbers: int) -> ALiBi:
        """See `Bias.decode`."""
        return cls(tensors[0])

    @staticmethod
    def narrow(tensors: list[Tensor], batch: slice, heads: slice) -> list[Tensor]:
        """See `Bias.narrow`."""
        return [tensors[0][heads]]

    def _distance(self, rows: Rows) -> Tensor:
        return (rows.positions() - rows.keys()).abs().to(self.slopes.dtype)

    def block(self, rows: Rows) -> Tensor:
        """See `Bias.block`."""
        return -self.slopes.view(1, -1, 1, 1) * self._distance(rows)

    def accumulate(self, gradients: list[Tensor], rows: Rows, gradient_bhnm: Tensor) -> None:
        """See `Bias.accumulate`."""
        gradients[0] -= (gradient_bhnm * self._distance(rows)).sum(dim=(0, 2, 3)).to(gradients[0].dtype)

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Bias.check`."""
        if self.slopes.shape != (h,):
            raise ValueError(f"ALiBi: expected one slope for each of {h} heads, got shape {tuple(self.slopes.shape)}")


@dataclass(frozen=True, eq=False)
class DenseBias(Bias):
    """Any tensor broadcastable to [b, h, n, m], added to the scores, with its gradient."""

    values: Tensor
    code = "dense"

    def __post_init__(self) -> None:
        if not self.values.is_floating_point():
            raise TypeError(
                f"DenseBias: expected a float tensor, got {self.values.dtype}; visibility belongs in a Mask"
            )
        if self.values.dim() != 4:
            raise ValueError(f"DenseBias: expected 4 dimensions [b, h, n, m], got shape {tuple(self.values.shape)}")

    def tensors(self) -> list[Tensor]:
        """See `Bias.tensors`."""
        return [self.values]

    @classmethod
    def decode(cls, tensors: list[Tensor], *numbers: int) -> DenseBias:
        """See `Bias.decode`."""
        return cls(tensors[0])

    @staticmethod
    def narrow(tensors: list[Tensor], batch: slice, heads: slice) -> list[Tensor]:
        """See `Bias.narrow`."""
        return [narrow_dim(narrow_dim(tensors[0], 0, batch), 1, heads)]

    def block(self, rows: Rows) -> Tensor:
        """See `Bias.block`."""
        part = self.values
        if part.shape[-2] > 1:
            part = part[..., rows.query, :]
        return part[..., rows.key] if part.shape[-1] > 1 else part

    def accumulate(self, gradients: list[Tensor], rows: Rows, gradient_bhnm: Tensor) -> None:
        """See `Bias.accumulate`; broadcast dimensions are summed. Rows of a block are a run, columns may have gaps."""
        target = gradients[0]
        summed = [d for d in range(4) if target.shape[d] == 1]
        part = gradient_bhnm.sum(dim=summed, keepdim=True) if summed else gradient_bhnm
        first_row, first_key = int(rows.query[0]), int(rows.key[0])
        if target.shape[-2] > 1:
            target = target[..., first_row : first_row + rows.query.numel(), :]
        if target.shape[-1] > 1 and rows.listed:
            target.index_add_(-1, rows.key, part.to(target.dtype))
            return
        if target.shape[-1] > 1:
            target = target[..., first_key : first_key + rows.key.numel()]
        target += part.to(target.dtype)

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Bias.check`."""
        if any(have not in (1, want) for have, want in zip(self.values.shape, (b, h, n, m), strict=True)):
            raise ValueError(f"DenseBias: shape {tuple(self.values.shape)} does not broadcast to {(b, h, n, m)}")


BIASES: dict[str, type[Bias]] = {cls.code: cls for cls in (ALiBi, DenseBias)}
"""By name; files of their own (`attention/t5.py`, `kerple.py`, `fire.py`) add to it."""


def read_bias(text: str, tensors: list[Tensor]) -> Bias:
    """Inverse of `Bias.text` and `Bias.tensors`: what a torch operator was given becomes a bias again."""
    name, *numbers = text.split(":")
    return BIASES[name].decode(tensors, *map(int, numbers))
