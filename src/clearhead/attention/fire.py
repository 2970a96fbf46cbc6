"""FIRE's positions as a bias by blocks (Li et al., arXiv 2310.04418): a learned function of an interpolated distance.

    bias[h, q, k] = f(x)[h],   x = psi(|q - k|) / psi(max(L, i)),   psi(d) = log(c d + 1)
    f(x)[h] = sum_u out[h, u] relu(weight[u] x + level[u]) + base[h]

i is the query's 0-based place in its own document, so the bias is not constant along diagonals: past L it is stretched
to the whole document. c > 0 and L > 0 are learned with f.

A hidden layer of ReLUs over one number is a function of straight pieces: u units bend it at u places. So a block finds
the piece of each x and reads a slope and a height per head; no block has a hidden layer, and one logarithm serves all
heads. The gradient needs per piece and head only the sums of g and of g x, from which those of all parameters follow,
and per pair the slope, for c and L. Exactly at a bend the left piece counts; its ReLUs' gradients are those of a
written-out layer but for a unit of negative weight there.

Where documents begin is read from the call's mask (padding on the left, packed documents), as BigBird's blocks are.
Keys to the right, where attention looks both ways, count by their distance; x may then pass 1.

Shapes: b batch, h query heads, n query rows, m keys, u hidden units, p = u + 1 pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce

import torch
from torch import Tensor

from clearhead.attention.bias import BIASES, Bias
from clearhead.attention.blocks import document_bounds
from clearhead.attention.terms import KeyRange, Rows, Segments, Term, narrow_dim


@dataclass(frozen=True, eq=False)
class FireBias(Bias):
    """See the top of this file."""

    weight: Tensor
    """[u]: of the hidden layer."""
    level: Tensor
    """[u]: its bias."""
    out: Tensor
    """[h, u]"""
    base: Tensor
    """[h]"""
    rate: Tensor
    """[1]: c."""
    threshold: Tensor
    """[1]: L."""
    start: Tensor | None = None
    """[1|b, 1|m] int64: where the document of a key column begins; None = as the call's mask says."""
    code = "fire"

    def __post_init__(self) -> None:
        units = self.weight.shape
        fits = self.weight.dim() == 1 and self.level.shape == units and self.out.shape[1:] == units
        single = self.rate.shape == self.threshold.shape == (1,)
        if not fits or not single or self.base.shape != self.out.shape[:1]:
            shapes = ", ".join(str(tuple(t.shape)) for t in self.tensors()[:6])
            raise ValueError(f"FireBias: expected shapes [u], [u], [heads, u], [heads], [1] and [1], got {shapes}")

    def tensors(self) -> list[Tensor]:
        """See `Bias.tensors`."""
        learned = [self.weight, self.level, self.out, self.base, self.rate, self.threshold]
        return learned if self.start is None else [*learned, self.start]

    @classmethod
    def decode(cls, tensors: list[Tensor], *numbers: int) -> FireBias:
        """See `Bias.decode`."""
        return cls(*tensors)

    @staticmethod
    def narrow(tensors: list[Tensor], batch: slice, heads: slice) -> list[Tensor]:
        """See `Bias.narrow`."""
        weight, level, out, base, rate, threshold, *start = tensors
        return [weight, level, out[heads], base[heads], rate, threshold, *(narrow_dim(t, 0, batch) for t in start)]

    def within(self, terms: Sequence[Term]) -> FireBias:
        """See `Bias.within`."""
        starts = [t.start[:, None] for t in terms if isinstance(t, KeyRange) and t.start is not None]
        starts += [document_bounds(t.key)[0] for t in terms if isinstance(t, Segments)]
        if self.start is not None or not starts:
            return self
        return replace(self, start=reduce(torch.maximum, starts))

    def block(self, rows: Rows) -> Tensor:
        """See `Bias.block`."""
        x_bnm = self._interpolated(rows)[0]
        edges, _, slope_hp, height_hp = self._pieces()
        piece_bnm = torch.bucketize(x_bnm.detach(), edges)
        return (_read(slope_hp, piece_bnm) * x_bnm + _read(height_hp, piece_bnm)).transpose(0, 1)

    def accumulate(self, gradients: list[Tensor], rows: Rows, gradient_bhnm: Tensor) -> None:
        """See `Bias.accumulate` and the top of this file."""
        x_bnm, far_bnm, longest_bn1, place_bn1 = self._interpolated(rows)
        edges, active_up, slope_hp, _ = self._pieces()
        piece_bnm = torch.bucketize(x_bnm, edges)
        if x_bnm.shape[0] == 1:
            gradient_bhnm = gradient_bhnm.sum(dim=0, keepdim=True)
        g_hbnm = gradient_bhnm.to(x_bnm.dtype).transpose(0, 1)

        index_hl = piece_bnm.flatten().expand(g_hbnm.shape[0], -1)
        sums_hp = torch.zeros_like(slope_hp).scatter_add_(1, index_hl, g_hbnm.flatten(1))
        moments_hp = torch.zeros_like(slope_hp).scatter_add_(1, index_hl, (g_hbnm * x_bnm).flatten(1))
        sums_hu, moments_hu = sums_hp @ active_up.T, moments_hp @ active_up.T
        gradients[0] += (self.out * moments_hu).sum(dim=0)
        gradients[1] += (self.out * sums_hu).sum(dim=0)
        gradients[2] += self.weight * moments_hu + self.level * sums_hu
        gradients[3] += sums_hp.sum(dim=1)

        # d x = d psi(|q - k|) / psi(longest) - x d psi(longest) / psi(longest)
        c = self.rate
        scaled_bn1 = torch.log1p(c * longest_bn1).reciprocal()
        g_x_bnm = (g_hbnm * _read(slope_hp, piece_bnm)).sum(dim=0) * scaled_bn1
        g_longest_bn1 = (g_x_bnm * x_bnm).sum(dim=-1, keepdim=True) / (1.0 + c * longest_bn1)
        gradients[4] += (g_x_bnm * far_bnm / (1.0 + c * far_bnm)).sum() - (g_longest_bn1 * longest_bn1).sum()
        place_bn1 = place_bn1.to(c.dtype)
        # 1 while L is the larger, one half where both are equal: the gradient of `maximum`.
        share_bn1 = (self.threshold > place_bn1).to(c.dtype) + 0.5 * (self.threshold == place_bn1)
        gradients[5] -= (g_longest_bn1 * c * share_bn1).sum()

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Bias.check`."""
        if self.out.shape[0] != h:
            raise ValueError(f"FireBias: expected outputs for each of {h} heads, got shape {tuple(self.out.shape)}")
        if self.start is None:
            return
        fits = self.start.dim() == 2 and self.start.shape[0] in (1, b) and self.start.shape[1] in (1, m)
        if not fits or self.start.is_floating_point():
            raise ValueError(
                f"FireBias: expected whole starts [{b}, {m}], or 1 in either place, got {self.start.dtype} "
                f"{tuple(self.start.shape)}"
            )

    def _interpolated(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x and |q - k|, [1|b, n', m']; max(L, i) and i, [1|b, n', 1]."""
        position_bn1 = rows.positions()[:, 0]
        place_bn1 = (position_bn1 - self._starts(position_bn1[..., 0])[..., None]).clamp_min(0)
        far_bnm = (position_bn1 - rows.key).abs().to(self.rate.dtype)
        longest_bn1 = torch.maximum(self.threshold, place_bn1.to(self.rate.dtype))
        x_bnm = torch.log1p(self.rate * far_bnm) / torch.log1p(self.rate * longest_bn1)
        return x_bnm.expand(longest_bn1.shape[0], -1, -1), far_bnm, longest_bn1, place_bn1

    def _starts(self, position_bn: Tensor) -> Tensor:
        """Where the document at each position begins, [1|b, n'|1]; positions outside count as the nearest key."""
        if self.start is None or self.start.shape[1] == 0:
            return torch.zeros_like(position_bn[:1, :1])
        if self.start.shape[1] == 1:
            return self.start
        b = max(position_bn.shape[0], self.start.shape[0])
        place_bn = position_bn.clamp(0, self.start.shape[1] - 1)
        return self.start.expand(b, -1).gather(1, place_bn.expand(b, -1))

    def _pieces(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(bends in ascending order [u], which units are on in which piece [u, p], slopes and heights [h, p])."""
        bent = self.weight != 0.0
        edge_u = torch.where(bent, -self.level / torch.where(bent, self.weight, 1.0), float("inf")).detach()
        edges, order_u = edge_u.sort()
        rank_u1, piece_p = order_u.argsort()[:, None], torch.arange(len(edges) + 1, device=edges.device)
        rising, falling = (self.weight > 0.0)[:, None], (self.weight < 0.0)[:, None]
        level_on = self.level[:, None] > 0.0
        on_up = torch.where(rising, rank_u1 < piece_p, torch.where(falling, rank_u1 >= piece_p, level_on))
        active_up = on_up.to(self.out.dtype)
        return (
            edges,
            active_up,
            (self.out * self.weight) @ active_up,
            (self.out * self.level) @ active_up + self.base[:, None],
        )


def _read(t_hp: Tensor, piece_bnm: Tensor) -> Tensor:
    """t[h, piece], [h, b, n, m]; faster on a CPU than indexing."""
    return t_hp.index_select(1, piece_bnm.flatten()).view(t_hp.shape[0], *piece_bnm.shape)


BIASES[FireBias.code] = FireBias
