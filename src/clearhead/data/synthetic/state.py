"""State: a counter modulo n that is set, raised, lowered or left alone; say its value after every token.

    =2 +1 +0 -1 -1 =0 +1        answers: 2 3 3 2 1 0 1

What follows the last set decides the value, all of it, so the state must be carried along: a window that has lost the
set knows nothing. Before the first set nothing is asked. The distance is that to the last set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clearhead.data.synthetic.task import IGNORE, Sample, Synthetic, numbered


@dataclass(frozen=True)
class State(Synthetic):
    """The answer to a state is the token that would set it."""

    states: int = 4
    sets: float = 0.04
    """Share of tokens that set the counter; the rest are +0, +1 and -1, evenly."""

    name: ClassVar[str] = "state"
    chance: ClassVar[str] = "1 / states"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `Synthetic`."""
        return (*numbered("=", self.states), "+0", "+1", "-1")

    def check(self) -> None:
        """See `Synthetic`."""
        self.at_least("states", 2)
        self.share("sets")

    def least(self) -> int:
        """See `Synthetic`."""
        return 1

    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """See `Synthetic`."""
        sets_t = random.random(length) < self.sets
        if not sets_t.any():  # a short sequence may have none: then one place sets, each equally likely
            sets_t[random.integers(length)] = True
        value_t, move_t = random.integers(self.states, size=length), random.integers(3, size=length)
        tokens_t = np.where(sets_t, value_t, move_t + self.states)
        step_t = np.where(sets_t, 0, np.array([0, 1, -1])[move_t])
        index_t = np.arange(length)
        last_t = np.maximum.accumulate(np.where(sets_t, index_t, -1))
        total_t, from_t = np.cumsum(step_t), np.maximum(last_t, 0)
        now_t = (value_t[from_t] + total_t - total_t[from_t]) % self.states
        known_t = last_t >= 0
        return Sample(tokens_t, np.where(known_t, now_t, IGNORE), np.where(known_t, index_t - last_t, -1))
