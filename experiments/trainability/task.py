"""A language that a working transformer learns in a hundred steps: each token has a few fixed successors.

A model that passes no information about its input from token to token stays at the entropy of a single token
(`marginal_entropy`); one that reads the current token reaches `conditional_entropy`. Between the two lie whole nats, so
a short run tells apart what trains and what does not. Legend: b batch, t tokens, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class SuccessorTask:
    """Markov chains over `vocab` tokens; the successor is one of `successors`, equally likely (drawn with repeats)."""

    vocab: int = 32
    successors: int = 4
    tokens: int = 32
    batch: int = 16
    seed: int = 0

    @cached_property
    def table_Vs(self) -> np.ndarray:
        """The successors of each token."""
        return np.random.default_rng([self.seed, 0]).integers(0, self.vocab, (self.vocab, self.successors))

    @cached_property
    def transition_VV(self) -> np.ndarray:
        """P(next | current)."""
        matrix = np.zeros((self.vocab, self.vocab))
        for current in range(self.vocab):
            np.add.at(matrix[current], self.table_Vs[current], 1.0 / self.successors)
        return matrix

    @cached_property
    def marginal_V(self) -> np.ndarray:
        """Mean distribution of a target over the positions of a sequence whose first token is uniform."""
        p = np.full(self.vocab, 1.0 / self.vocab)
        total = np.zeros(self.vocab)
        for _ in range(self.tokens):
            p = p @ self.transition_VV
            total += p
        return total / self.tokens

    @property
    def marginal_entropy(self) -> float:
        """Best loss, in nats, of a model that knows nothing but the frequencies."""
        return float(-(self.marginal_V * np.log(np.maximum(self.marginal_V, 1e-300))).sum())

    @cached_property
    def conditional_entropy(self) -> float:
        """Best loss there is, in nats: the entropy of the successor."""
        p = np.full(self.vocab, 1.0 / self.vocab)
        rows = -(self.transition_VV * np.log(np.maximum(self.transition_VV, 1e-300))).sum(axis=1)
        total = 0.0
        for _ in range(self.tokens):
            total += float(p @ rows)
            p = p @ self.transition_VV
        return total / self.tokens

    def batch_at(self, seed: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets [b, t] of one step; a pure function."""
        draw = np.random.default_rng([self.seed, 1, seed, step])
        chain = np.empty((self.batch, self.tokens + 1), np.int64)
        chain[:, 0] = draw.integers(0, self.vocab, self.batch)
        picks = draw.integers(0, self.successors, (self.batch, self.tokens))
        for t in range(self.tokens):
            chain[:, t + 1] = self.table_Vs[chain[:, t], picks[:, t]]
        return chain[:, :-1], chain[:, 1:]
