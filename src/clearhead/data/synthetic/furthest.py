"""Furthest: tokens are points on a circle; say for each the furthest point among those in sight.

    p0 p2 p5 (8 points)        both ways: p5 p5 p0 (p0 and p2 are both 3 away from p5; going up from p5, p0 comes first)

One layer that sees everything can look for the opposite of its own point; a sparse pattern with few layers cannot, for
every token asks for another point (BigBird, arXiv 2007.14062, proposition 1: the furthest-vector task). A causal model
is asked for the furthest point so far, itself included.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clearhead.data.synthetic.task import Sample, Synthetic, numbered


@dataclass(frozen=True)
class Furthest(Synthetic):
    """Points are evenly spaced; of two points equally far away the one that comes first going up counts."""

    points: int = 64

    name: ClassVar[str] = "furthest"
    chance: ClassVar[str] = "1 / points; the opposite point is right as often as it is there"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `Synthetic`."""
        return numbered("p", self.points)

    def check(self) -> None:
        """See `Synthetic`."""
        self.at_least("points", 3)

    def least(self) -> int:
        """See `Synthetic`."""
        return 2

    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """See `Synthetic`. Legend: p points; r the steps up from a token's own point, furthest first."""
        n = self.points
        tokens_t = random.integers(n, size=length)
        step_r = np.array(sorted(range(n), key=lambda up: (-min(up, n - up), up)))
        index_t = np.arange(length)
        # Where each point was met last: so far, or (both ways) anywhere.
        last_tp = np.full((length, n), -1, dtype=np.int32)
        last_tp[index_t, tokens_t] = index_t
        last_tp = np.maximum.accumulate(last_tp, axis=0)
        if both_ways:
            last_tp[:] = last_tp[-1]
        targets_t, place_t, open_t = np.zeros_like(tokens_t), np.full_like(tokens_t, -1), index_t
        for up in step_r.tolist():  # soon everyone has found someone
            point_t = (tokens_t[open_t] + up) % n
            targets_t[open_t], place_t[open_t] = point_t, last_tp[open_t, point_t]
            open_t = open_t[place_t[open_t] < 0]
        return Sample(tokens_t, targets_t, np.abs(index_t - place_t))
