"""Two-step recall: a stream of written pairs [key][value] and of queries [?key], to be answered by the key's last value.

Where a value stands, its key stands one token before. So an answer takes two steps: a lower layer that joins a value
with the token before it, and a higher one that looks the key up, as far back as the longest memory reaches.

Tokens: keys 0..23, values 24..31, queries 32..55. A pair makes its key live, a query answers one live key, drawn evenly,
and that key is live no more. A pair takes one of the keys that were written longest ago, so what an old pair said is rarely
near; a key that was not asked for within `REACH` tokens is dropped. Only answers are learned and scored.

Legend: b rows, k keys, t tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

KEYS, VALUES, LIVE, REACH, ASKED = 24, 8, 18, 90, 0.5
"""LIVE: live keys at most. ASKED: chance that a query comes next, and not a pair."""
VOCABULARY = 2 * KEYS + VALUES
IGNORE = -100
BUCKETS = ((1, 8), (8, 16), (16, 32), (32, 64), (64, REACH + 1))
"""Distances from a query to its value, [low, high)."""
NEVER = -(1 << 40)

Ints = npt.NDArray[np.int64]


class Recall:
    """`rows` streams without end; `read(n)` gives the next n tokens of each."""

    def __init__(self, rows: int, seed: int) -> None:
        self.draw = np.random.default_rng(seed)
        self.place = 0
        self.at_bk = NEVER + self.draw.permuted(np.tile(np.arange(KEYS), (rows, 1)), axis=1)
        """Place of each key's last value."""
        self.live_bk = np.zeros((rows, KEYS), dtype=bool)
        self.value_bk = np.zeros((rows, KEYS), dtype=np.int64)
        self.open_b = np.full(rows, -1)
        """The key whose value comes next; -1 = none."""

    def read(self, tokens: int) -> tuple[Ints, Ints, Ints]:
        """Tokens, their answers (-100: nothing is asked) and the distances to what is asked, each [b, t]."""
        made = [self._next() for _ in range(tokens)]
        token, answer, distance = (np.stack(column, axis=1) for column in zip(*made, strict=True))
        return token, answer, distance

    def _next(self) -> tuple[Ints, Ints, Ints]:
        every, rows = np.arange(len(self.open_b)), len(self.open_b)
        self.live_bk &= self.place - self.at_bk <= REACH
        count_b = self.live_bk.sum(axis=1)
        written = self.open_b >= 0
        asks = ~written & (count_b > 0) & ((self.draw.random(rows) < ASKED) | (count_b == LIVE))
        asked_b = np.where(self.live_bk, self.draw.random((rows, KEYS)), -1.0).argmax(axis=1)
        oldest_bk = np.where(self.live_bk, self.place + 1, self.at_bk).argsort(axis=1)  # the live ones last
        key_b = np.where(written, self.open_b, oldest_bk[every, self.draw.integers(KEYS - LIVE, size=rows)])
        value_b = self.draw.integers(VALUES, size=rows)

        token_b = np.where(written, KEYS + value_b, np.where(asks, KEYS + VALUES + asked_b, key_b))
        answer_b = np.where(asks, KEYS + self.value_bk[every, asked_b], IGNORE)
        distance_b = np.where(asks, self.place - self.at_bk[every, asked_b], 0)
        self.at_bk[written, key_b[written]] = self.place
        self.value_bk[written, key_b[written]] = value_b[written]
        self.live_bk[written, key_b[written]] = True
        self.live_bk[asks, asked_b[asks]] = False
        self.open_b = np.where(written | asks, -1, key_b)
        self.place += 1
        return token_b, answer_b, distance_b


def segments(rows: int, length: int, seed: int) -> Iterator[tuple[Ints, Ints, Ints]]:
    """Segments of `rows` streams, each [rows, length]; every stream goes on."""
    stream = Recall(rows, seed)
    while True:
        yield stream.read(length)
