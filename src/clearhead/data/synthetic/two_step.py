"""Two-step recall: a stream of pairs and questions in one; a later pair of a key replaces the earlier.

    k3 v1 k7 v0 q3 k3 v5 q7 q3        answers: v1 at the first q3, v0 at q7, v5 at the second q3

A value stands beside its key and not in it, so one layer must bring the key to its value ("what stood before me?")
before another can find it: long memory is of use above the first layer and not in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clearhead.data.synthetic.task import Sample, Synthetic, numbered, unanswered


@dataclass(frozen=True)
class TwoStep(Synthetic):
    """Each sequence uses `live` of the keys; a question asks for a key by how often it was set so far."""

    keys: int = 24
    values: int = 8
    live: int = 18
    ask: float = 0.5
    """Share of questions among pairs and questions."""

    name: ClassVar[str] = "two-step"
    chance: ClassVar[str] = "1 / values"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `Synthetic`."""
        return (*numbered("k", self.keys), *numbered("v", self.values), *numbered("q", self.keys))

    def check(self) -> None:
        """See `Synthetic`."""
        self.at_least("live", 1)
        self.at_least("values", 2)
        self.share("ask")
        if self.live > self.keys:
            raise self.error(f"live: expected at most keys={self.keys}, got {self.live}")

    def least(self) -> int:
        """See `Synthetic`: a pair and a question."""
        return 3

    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """See `Synthetic`. Legend: i items (pairs and questions), p pairs, q questions, k live keys."""
        asks_i = random.random(length) < self.ask
        asks_i[0] = False
        after_i = np.cumsum(np.where(asks_i, 1, 2))
        count = int(np.searchsorted(after_i, length, side="right"))
        asks_i = asks_i[:count]
        used = int(after_i[count - 1])
        if used < length:  # one token is left, too few for the pair that was next
            asks_i = np.append(asks_i, True)
        if not asks_i.any():  # every sequence asks something
            asks_i = np.append(asks_i[:-1], [True, True])
        size_i = np.where(asks_i, 1, 2)
        begin_i = np.cumsum(size_i) - size_i

        live_k = random.permutation(self.keys)[: self.live]
        pair_p, ask_q = begin_i[~asks_i], begin_i[asks_i]
        which_p = random.integers(self.live, size=len(pair_p))
        value_p = random.integers(self.values, size=len(pair_p)) + self.keys
        # A question draws one of the pairs before it; the answer is the last pair of the same key before it.
        before_q = np.cumsum(~asks_i)[asks_i]
        which_q = which_p[(random.random(len(ask_q)) * before_q).astype(np.int64)]
        order_p = np.arange(len(pair_p))
        last_kp = np.maximum.accumulate(np.where(which_p == np.arange(self.live)[:, None], order_p, -1), axis=1)
        source_q = last_kp[which_q, before_q - 1]

        sample = unanswered(np.zeros(length, dtype=np.int64))
        sample.tokens[pair_p], sample.tokens[pair_p + 1] = live_k[which_p], value_p
        sample.tokens[ask_q] = live_k[which_q] + self.keys + self.values
        sample.targets[ask_q] = value_p[source_q]
        sample.distance[ask_q] = ask_q - (pair_p[source_q] + 1)
        return sample
