"""Segments of documents, and pairs of them: the next one, one from anywhere else, and one further on.

A document is cut from its first token on, `x_0 x_1 x_2 ...`; no segment and no pair crosses a document. For a drawn
segment i that has a next one in its document:

    next     i + 1
    other    uniform over all segments of all documents but i and i + 1
    later    i + 1 + k,  k in 0..m,  m = segments of the document behind i + 1
             q(k) = (1 - p)^k p / (1 - (1 - p)^(m + 1)): geometric, cut off where the document ends

Dividing by what lies within the document keeps q a probability. The released code of BMI clips k instead, which puts
the whole tail on the last segment, and takes (1 - p)^(k + 1) p, whose constant factor falls out later.

Everything is a pure function of (documents, cut, seed, step), so a resumed run draws what it would have drawn.
Legend: n segments, b pairs, t tokens of the longest segment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.errors import UserError
from clearhead.objectives.config import parse_cut

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
_STREAM = 0x5E61  # keeps these draws apart from others that are seeded by (seed, step)
LEAST_SENTENCE = 4
"""Tokens that a sentence has at least: "..." and "?!" end one sentence, not three."""


@dataclass(frozen=True)
class Padded:
    """Segments of unequal length, filled on the right."""

    tokens: Ints
    """[b, t]; 0 where nothing stands."""
    lengths: Ints
    """[b], at least 1."""

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """[b, t], True = a real token."""
        return np.arange(self.tokens.shape[1]) < self.lengths[:, None]


@dataclass(frozen=True)
class Pairs:
    """What a step reads; every array has a row for each pair."""

    index: Ints
    """Number of the first segment of each pair, [b]; for tests and for those who look."""
    first: Padded
    next: Padded
    other: Padded
    """A segment from anywhere else: with `first` it makes a pair as if the two were independent."""
    later: Padded
    log_q: Floats
    """Log probability that `later` was drawn, given `first`, [b]."""


class Segments:
    """The segments of some documents, by number, in reading order. Made by `cut_documents`."""

    def __init__(self, texts: Sequence[npt.NDArray[Any]], document: Ints, start: Ints, length: Ints) -> None:
        self._texts = texts
        self.document, self.start, self.length = document, start, length
        """Which document, where in it, and how many tokens; [n] each."""
        if not len(document):
            raise UserError("segments: there is no text to cut")
        last_d = np.searchsorted(document, np.arange(len(texts)), side="right") - 1
        self.behind: Ints = last_d[document] - np.arange(len(document))
        """Segments that follow in the same document, [n]."""
        self.leading: Ints = np.flatnonzero(self.behind > 0)
        """Numbers of the segments that have a next one."""
        if not len(self.leading):
            raise UserError(
                f"segments: none of the {len(texts)} documents has two segments; cut shorter ones (objective.segments)"
            )

    def __len__(self) -> int:
        return len(self.document)

    def read(self, index_b: Ints) -> Padded:
        """Return the segments of these numbers."""
        length_b = self.length[index_b]
        tokens_bt = np.zeros((len(index_b), int(length_b.max())), dtype=np.int64)
        for row, (i, n) in enumerate(zip(index_b, length_b, strict=True)):
            tokens_bt[row, :n] = self._texts[self.document[i]][self.start[i] : self.start[i] + n]
        return Padded(tokens_bt, length_b)

    def draw(self, count: int, *, lookahead: float, seed: int, step: int) -> Pairs:
        """Return `count` pairs: a pure function of the segments and the arguments.

        lookahead: p of the geometric distance of `later`, in (0, 1].
        """
        random = np.random.default_rng([seed, step, _STREAM])
        index_b = self.leading[random.integers(0, len(self.leading), size=count)]
        other_b = other_than(index_b, len(self), random)
        ahead_b, log_q_b = draw_ahead(self.behind[index_b] - 1, lookahead, random)
        return Pairs(
            index_b,
            self.read(index_b),
            self.read(index_b + 1),
            self.read(other_b),
            self.read(index_b + 1 + ahead_b),
            log_q_b,
        )


def cut_documents(documents: Sequence[npt.NDArray[Any]], cut: str, *, tokenizer: Any = None) -> Segments:
    """Cut token arrays (without separators) as `cut` says: "chunk:N" or "sentence:N".

    chunk: N tokens each; the last of a document may be shorter. sentence: a segment ends behind a token that ends with
    `.`, `?` or `!`, or that holds an empty line, once it has `LEAST_SENTENCE` tokens and the next token is no such end;
    what exceeds N tokens is left out, as published. `tokenizer` is needed for sentences.

    Raises `UserError` when nothing can be paired.
    """
    name, size = parse_cut(cut)
    ends_V = sentence_ends(tokenizer) if name == "sentence" else None
    rows: list[tuple[int, int, int]] = []
    for number, tokens in enumerate(documents):
        borders = range(size, len(tokens), size) if ends_V is None else _sentence_borders(ends_V[np.asarray(tokens)])
        edges = [0, *borders, len(tokens)]
        rows += [(number, begin, min(size, end - begin)) for begin, end in pairwise(edges) if end > begin]
    table = np.asarray(rows, dtype=np.int64).reshape(-1, 3)
    return Segments(documents, table[:, 0], table[:, 1], table[:, 2])


def other_than(index_b: Ints, count: int, random: np.random.Generator) -> Ints:
    """Uniform numbers below `count`, none of them its row's index or the one after. Raises `UserError` below 3."""
    if count < 3:
        raise UserError(f"segments: a third segment is needed beside a pair, the text has {count}")
    drawn_b = random.integers(0, count - 2, size=len(index_b))
    return drawn_b + 2 * (drawn_b >= index_b)


def draw_ahead(most_b: Ints, p: float, random: np.random.Generator) -> tuple[Ints, Floats]:
    """Draw k in 0..most from the geometric law cut off there; return k and its log probability, [b] each.

    By inversion: with S = 1 - (1 - p)^(most + 1) the mass within reach, k = floor(log(1 - u S) / log(1 - p)).
    """
    u_b = random.random(len(most_b))
    if p == 1.0:
        return np.zeros_like(most_b), np.zeros(len(most_b))
    stay = np.log1p(-p)  # log(1 - p)
    mass_b = -np.expm1((most_b + 1) * stay)
    k_b = np.floor(np.log1p(-u_b * mass_b) / stay).astype(np.int64)
    k_b = np.clip(k_b, 0, most_b)  # rounding at u close to 1
    return k_b, log_ahead(k_b, most_b, p)


def log_ahead(k_b: Ints, most_b: Ints, p: float) -> Floats:
    """log q(k) of the law in the module's text, [b]; it sums to 1 over k = 0..most."""
    if p == 1.0:
        return np.where(k_b == 0, 0.0, -np.inf)
    stay = np.log1p(-p)
    return k_b * stay + np.log(p) - np.log(-np.expm1((most_b + 1) * stay))


def sentence_ends(tokenizer: Any) -> npt.NDArray[np.bool_]:
    """Which ids end a sentence, [V]; the separator does not."""
    if tokenizer is None:
        raise ValueError("sentence: expected the tokenizer, which says what stands in a token")
    ends_V = np.zeros(tokenizer.vocab_size, dtype=bool)
    for token in range(tokenizer.vocab_size):
        if token == tokenizer.separator:
            continue
        text = tokenizer.decode([token])
        ends_V[token] = text.rstrip().endswith((".", "?", "!")) or "\n\n" in text
    return ends_V


def _sentence_borders(ends_t: npt.NDArray[np.bool_]) -> list[int]:
    """Positions inside a document at which a new sentence begins."""
    borders: list[int] = []
    begin = 0
    for place in np.flatnonzero(ends_t[:-1] & ~ends_t[1:]) + 1:
        if place - begin >= LEAST_SENTENCE:
            borders.append(int(place))
            begin = int(place)
    return borders
