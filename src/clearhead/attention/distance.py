"""Biases that hang on the signed distance k - q alone: constant along diagonals.

A block of n' rows and m' columns has n' + m' - 1 diagonals, so values are made, and gradients summed, once per
diagonal. Columns with gaps (a block pattern's list) have no such runs; there each pair counts as a diagonal of its own.
Shapes: b batch, h query heads, n query rows, m keys, l diagonals of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.bias import Bias
from clearhead.attention.terms import Rows


class DistanceBias(Bias):
    """Base. A subclass gives `values` and adds the sums of its diagonals to its gradients."""

    def values(self, distance: Tensor) -> Tensor:
        """The bias at signed distances k - q, int64 [...]: [h, ...]."""
        raise NotImplementedError

    def add_gradient(self, gradients: list[Tensor], distance_bl: Tensor, sums_bhl: Tensor) -> None:
        """Add to `gradients` what gradients `sums_bhl` at distances [b, l] come to."""
        raise NotImplementedError

    def block(self, rows: Rows) -> Tensor:
        """See `Bias.block`: row i reads the diagonals n' - 1 - i, ..., n' - 1 - i + m' - 1."""
        if rows.listed or not rows.query.numel() or not rows.key.numel():
            return self.values(_each(rows)).transpose(0, 1)
        values_hbl = self.values(_diagonals(rows))
        return values_hbl.transpose(0, 1).unfold(-1, rows.key.numel(), 1).flip(2)

    def accumulate(self, gradients: list[Tensor], rows: Rows, gradient_bhnm: Tensor) -> None:
        """See `Bias.accumulate`: each row is shifted to its place, so that diagonals become columns to sum."""
        distance_bl = _each(rows).flatten(1) if rows.listed else _diagonals(rows)
        if distance_bl.shape[0] == 1:
            gradient_bhnm = gradient_bhnm.sum(dim=0, keepdim=True)
        b, h, n, m = gradient_bhnm.shape
        if rows.listed:
            sums_bhl = gradient_bhnm.flatten(2)
        else:
            padded = F.pad(gradient_bhnm.flip(2), (0, n)).flatten(2)[..., : n * (n + m - 1)]
            sums_bhl = padded.view(b, h, n, n + m - 1).sum(dim=2)
        self.add_gradient(gradients, distance_bl, sums_bhl.to(gradients[0].dtype))


def _diagonals(rows: Rows) -> Tensor:
    """Distances of the block's diagonals, from the lower left corner to the upper right, [1|b, l]."""
    n, m = rows.query.numel(), rows.key.numel()
    steps_l = torch.arange(n + m - 1, device=rows.key.device)
    corner = rows.key[0] - rows.query[-1]
    offset = rows.offset[:, None] if isinstance(rows.offset, Tensor) else rows.offset
    return corner + steps_l[None] - offset


def _each(rows: Rows) -> Tensor:
    """The distance of each pair, [1|b, n', m']."""
    return (rows.keys() - rows.positions())[:, 0]
