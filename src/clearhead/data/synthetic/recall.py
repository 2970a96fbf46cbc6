"""Recall: pairs of key and value first, then the keys again, scattered, each asking for its value.

    k4 v1 k0 v7 . . k0 . . k4        answers: v7 at the second k0, v1 at the second k4

Multi-query associative recall (Arora et al., Zoology, arXiv 2312.04927); there questions come soon after their pair
more often than late, here every place after the pairs is equally likely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clearhead.data.synthetic.task import Sample, Synthetic, numbered, unanswered


@dataclass(frozen=True)
class Recall(Synthetic):
    """Every pair is asked for once."""

    pairs: int = 8
    keys: int = 32
    values: int = 32

    name: ClassVar[str] = "recall"
    chance: ClassVar[str] = "1 / values; 1 / pairs by one of the values in sight"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `Synthetic`."""
        return (*numbered("k", self.keys), *numbered("v", self.values), ".")

    def check(self) -> None:
        """See `Synthetic`."""
        self.at_least("pairs", 1)
        self.at_least("values", 2)
        if self.pairs > self.keys:
            raise self.error(f"pairs: expected at most keys={self.keys}, got {self.pairs}")

    def least(self) -> int:
        """See `Synthetic`."""
        return 3 * self.pairs

    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """See `Synthetic`."""
        n = self.pairs
        key_n = random.choice(self.keys, size=n, replace=False)
        value_n = random.integers(self.values, size=n) + self.keys
        sample = unanswered(np.full(length, self.keys + self.values, dtype=np.int64))
        sample.tokens[0 : 2 * n : 2], sample.tokens[1 : 2 * n : 2] = key_n, value_n
        asked_n = random.choice(length - 2 * n, size=n, replace=False) + 2 * n  # in the order of the pairs
        sample.tokens[asked_n], sample.targets[asked_n] = key_n, value_n
        sample.distance[asked_n] = asked_n - (2 * np.arange(n) + 1)
        return sample
