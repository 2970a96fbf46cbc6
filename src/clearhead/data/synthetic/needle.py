"""Needle: facts planted in a long filler, asked for at the end (or in the middle).

    w3 w9 w9 k2 v5 w1 ... w7 w0 ? k2        answer at the last token: v5

With keys=0 the fact is a lone value and the question a lone `?`: one step, where a key takes two (find the key, read
what follows). Filler, keys and values share no symbol, so the answer is where the key is and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from clearhead.data.synthetic.task import Ints, Sample, Synthetic, numbered, unanswered


@dataclass(frozen=True)
class Needle(Synthetic):
    """`facts` different keys with a value each, `asks` of them asked for."""

    facts: int = 1
    asks: int = 1
    keys: int = 16
    values: int = 8
    words: int = 16
    """Different words of the filler."""
    reader: str = "end"
    """end | middle: where the questions stand. From the middle a model that looks both ways must look both ways."""
    away: int = 0
    """Least number of tokens between a fact and the questions."""
    edge: int = 0
    """Tokens at both ends of the sequence that hold no fact (BigBird's global blocks see them from everywhere)."""

    name: ClassVar[str] = "needle"
    chance: ClassVar[str] = "1 / values"

    @property
    def symbols(self) -> tuple[str, ...]:
        """See `Synthetic`."""
        return (*numbered("w", self.words), *numbered("k", self.keys), *numbered("v", self.values), "?")

    def check(self) -> None:
        """See `Synthetic`."""
        for name, least in (("facts", 1), ("asks", 1), ("keys", 0), ("values", 2), ("words", 1)):
            self.at_least(name, least)
        self.at_least("away", 0)
        self.at_least("edge", 0)
        self.one_of("reader", ("end", "middle"))
        if self.asks > self.facts:
            raise self.error(f"asks: expected at most facts={self.facts}, got {self.asks}")
        if self.facts > max(self.keys, 1):
            raise self.error(f"facts: expected at most keys={self.keys} (a lone one without keys), got {self.facts}")

    @property
    def _size(self) -> int:
        """Tokens of a fact, and of a question."""
        return 2 if self.keys else 1

    def least(self) -> int:
        """See `Synthetic`."""
        # Facts before the questions, in slots whose first may be late by a token.
        before = self.edge + self._size * self.facts + self._size - 1 + self.away
        asked = self._size * self.asks
        return 2 * before + asked if self.reader == "middle" else before + asked

    def _slots(self, random: np.random.Generator, length: int, both_ways: bool) -> tuple[Ints, int]:
        """Where facts may begin, and where the questions do."""
        size, asked = self._size, self._size * self.asks
        begin = (length - asked) // 2 if self.reader == "middle" else length - asked
        stretches = [(self.edge, begin - self.away)]
        if both_ways and self.reader == "middle":
            stretches.append((begin + asked + self.away, length - self.edge))
        late = int(random.integers(size))
        return np.concatenate([np.arange(a + late, b - size + 1, size) for a, b in stretches]), begin

    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """See `Synthetic`."""
        size, first_key, first_value = self._size, self.words, self.words + self.keys
        slots, begin = self._slots(random, length, both_ways)
        sample = unanswered(random.integers(self.words, size=length))
        fact_f = random.choice(slots, size=self.facts, replace=False)
        key_f = random.choice(max(self.keys, 1), size=self.facts, replace=False) + first_key
        value_f = random.integers(self.values, size=self.facts) + first_value
        if self.keys:
            sample.tokens[fact_f] = key_f
        place_f = fact_f + size - 1
        sample.tokens[place_f] = value_f

        asked_a = random.permutation(self.facts)[: self.asks]
        question_a = begin + size * np.arange(self.asks)
        sample.tokens[question_a] = len(self.symbols) - 1
        answer_a = question_a + size - 1
        if self.keys:
            sample.tokens[answer_a] = key_f[asked_a]
        sample.targets[answer_a] = value_f[asked_a]
        sample.distance[answer_a] = np.abs(answer_a - place_f[asked_a])
        return sample
