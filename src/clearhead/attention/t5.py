"""T5's relative positions as a bias by blocks (Raffel et al., arXiv 1910.10683, section 2.1).

    bias[h, q, k] = table[h, bucket(k - q)]

The paper gives the idea: one learned number per head and bucket, shared by all layers, exact buckets for near keys,
logarithmically wider ones up to a largest distance, one bucket for all beyond. How buckets are cut, and that half of
them serve keys to the right when attention is bidirectional, follows the released T5 models.

The bias is constant along diagonals. A block of n' rows and m' columns has n' + m' - 1 of them, so buckets are found
and gradients summed once per diagonal. Shapes: b batch, h query heads, n query rows, m keys, l diagonals of a block,
u buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.bias import BIASES, Bias
from clearhead.attention.terms import Rows


@torch.compiler.assume_constant_result
def bucket_starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    """Smallest distance of bucket 1, 2, ...: [buckets - 1], never decreasing.

    The first half holds one distance each. Bucket half + i begins where log(d / half) / log(max_distance / half)
    reaches i / (buckets - half), decided in whole numbers, so that no rounding of a logarithm moves an edge.
    """
    return _starts(buckets, max_distance)


@lru_cache(maxsize=64)
def _starts(buckets: int, max_distance: int) -> tuple[int, ...]:
    half = buckets // 2
    wide = buckets - half
    starts = list(range(1, half + 1))
    for i in range(1, wide):
        start = starts[-1] if starts else 1
        while start**wide * half**i < max_distance**i * half**wide:
            start += 1
        starts.append(start)
    return tuple(starts)


def relative_bucket(distance: Tensor, *, buckets: int, max_distance: int, bidirectional: bool) -> Tensor:
    """Bucket of each signed distance k - q (key minus query), int64 of the same shape.

    Causal: keys to the right share bucket 0 with the query itself (the mask hides them). Bidirectional: the upper half
    of the buckets is for keys to the right.
    """
    side = buckets // 2 if bidirectional else buckets
    starts = torch.tensor(bucket_starts(side, max_distance), device=distance.device)
    far = distance.abs() if bidirectional else (-distance).clamp_min(0)
    bucket = torch.bucketize(far, starts, right=True)
    return torch.where(distance > 0, bucket + side, bucket) if bidirectional else bucket


@dataclass(frozen=True, eq=False)
class T5Bias(Bias):
    """See the top of this file. `table` is [h, u]."""

    table: Tensor
    max_distance: int = 128
    bidirectional: bool = False
    code = "t5"

    def __post_init__(self) -> None:
        side = self.table.shape[-1] // (2 if self.bidirectional else 1)
        if self.table.dim() != 2 or side < 2 or (self.bidirectional and self.table.shape[-1] % 2):
            raise ValueError(
                f"T5Bias: expected a table [heads, buckets] with at least {4 if self.bidirectional else 2} buckets"
                f"{', an even number' if self.bidirectional else ''}, got shape {tuple(self.table.shape)}"
            )
        if self.max_distance <= side // 2:
            raise ValueError(
                f"T5Bias: max_distance must lie above the {side // 2} exact buckets, got {self.max_distance}"
            )

    def tensors(self) -> list[Tensor]:
        """See `Bias.tensors`."""
        return [self.table]

    def numbers(self) -> tuple[int, ...]:
        """See `Bias.numbers`."""
        return (self.max_distance, int(self.bidirectional))

    @classmethod
    def decode(cls, tensors: list[Tensor], *numbers: int) -> T5Bias:
        """See `Bias.decode`."""
        return cls(tensors[0], numbers[0], bool(numbers[1]))

    @staticmethod
    def narrow(tensors: list[Tensor], batch: slice, heads: slice) -> list[Tensor]:
        """See `Bias.narrow`."""
        return [tensors[0][heads]]

    def _buckets(self, rows: Rows) -> Tensor:
        """Buckets of the block's diagonals, from the lower left corner to the upper right, [1|b, l]."""
        n, m = rows.query.numel(), rows.key.numel()
        steps_l = torch.arange(n + m - 1, device=rows.key.device)
        corner = rows.key[0] - rows.query[-1]
        offset = rows.offset[:, None] if isinstance(rows.offset, Tensor) else rows.offset
        return self._bucket(corner + steps_l[None] - offset)

    def _bucket(self, distance: Tensor) -> Tensor:
        return relative_bucket(
            distance, buckets=self.table.shape[1], max_distance=self.max_distance, bidirectional=self.bidirectional
        )

    def _each(self, rows: Rows) -> Tensor:
        """The bucket of each pair, [1|b, n', m']: for columns with gaps, whose diagonals are no runs."""
        return self._bucket((rows.keys() - rows.positions())[:, 0])

    def block(self, rows: Rows) -> Tensor:
        """See `Bias.block`: row i reads the diagonals n' - 1 - i, ..., n' - 1 - i + m' - 1."""
        if rows.listed:
            return self.table[:, self._each(rows)].transpose(0, 1)
        values_hbl = self.table[:, self._buckets(rows)]
        return values_hbl.transpose(0, 1).unfold(-1, rows.key.numel(), 1).flip(2)

    def accumulate(self, gradients: list[Tensor], rows: Rows, gradient_bhnm: Tensor) -> None:
        """See `Bias.accumulate`: each row is shifted to its place, so that diagonals become columns to sum."""
        bucket_bl = self._each(rows).flatten(1) if rows.listed else self._buckets(rows)
        if bucket_bl.shape[0] == 1:
            gradient_bhnm = gradient_bhnm.sum(dim=0, keepdim=True)
        b, h, n, m = gradient_bhnm.shape
        if rows.listed:
            sums_bhl = gradient_bhnm.flatten(2).to(gradients[0].dtype)
        else:
            padded = F.pad(gradient_bhnm.flip(2), (0, n)).flatten(2)[..., : n * (n + m - 1)]
            sums_bhl = padded.view(b, h, n, n + m - 1).sum(dim=2).to(gradients[0].dtype)
        for sums_hl, bucket_l in zip(sums_bhl, bucket_bl, strict=True):
            gradients[0].index_add_(1, bucket_l, sums_hl)

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Bias.check`."""
        if self.table.shape[0] != h:
            raise ValueError(f"T5Bias: expected a row for each of {h} heads, got shape {tuple(self.table.shape)}")


BIASES[T5Bias.code] = T5Bias
