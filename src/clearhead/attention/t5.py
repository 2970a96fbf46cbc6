"""T5's relative positions as a bias by blocks (Raffel et al., arXiv 1910.10683, section 2.1).

    bias[h, q, k] = table[h, bucket(k - q)]

The paper gives the idea: one learned number per head and bucket, shared by all layers, exact buckets for near keys,
logarithmically wider ones up to a largest distance, one bucket for all beyond. How buckets are cut, and that half of
them serve keys to the right when attention is bidirectional, follows the released T5 models.

Shapes: b batch, h query heads, l diagonals of a block, u buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from clearhead.attention.bias import BIASES
from clearhead.attention.distance import DistanceBias


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
class T5Bias(DistanceBias):
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

    def values(self, distance: Tensor) -> Tensor:
        """See `DistanceBias.values`."""
        return self.table[:, self._bucket(distance)]

    def add_gradient(self, gradients: list[Tensor], distance_bl: Tensor, sums_bhl: Tensor) -> None:
        """See `DistanceBias.add_gradient`."""
        for sums_hl, bucket_l in zip(sums_bhl, self._bucket(distance_bl), strict=True):
            gradients[0].index_add_(1, bucket_l, sums_hl)

    def _bucket(self, distance: Tensor) -> Tensor:
        return relative_bucket(
            distance, buckets=self.table.shape[1], max_distance=self.max_distance, bidirectional=self.bidirectional
        )

    def check(self, b: int, h: int, n: int, m: int) -> None:
        """See `Bias.check`."""
        if self.table.shape[0] != h:
            raise ValueError(f"T5Bias: expected a row for each of {h} heads, got shape {tuple(self.table.shape)}")


BIASES[T5Bias.code] = T5Bias
