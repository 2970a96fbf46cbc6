"""A corpus whose only long-range structure is known: a topic for each document, everything else drawn from it alone.

A document has a topic z, uniform; each of its symbols is drawn from p(symbol | z), independently. Nothing but z ties
segments together, so what a model can gain from a segment before is exactly what that segment says of z. The shuffled
control draws a topic for each segment instead: the same segments, in documents that tell nothing of each other.
(Shuffling within a document would change nothing: its segments are exchangeable.)
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Corpus:
    """How it is drawn."""

    documents: int = 1500
    segments: int = 8
    length: int = 12
    topics: int = 6
    symbols: int = 48
    own: int = 12
    """Symbols that a topic likes."""
    share: float = 0.75
    """Of a topic's symbols, how much falls on those."""


def symbol_law(corpus: Corpus, seed: int) -> Floats:
    """p(symbol | topic), [topics, symbols]."""
    random = np.random.default_rng([seed, 1])
    law = np.full((corpus.topics, corpus.symbols), (1 - corpus.share) / corpus.symbols)
    for topic in range(corpus.topics):
        law[topic, random.choice(corpus.symbols, corpus.own, replace=False)] += corpus.share / corpus.own
    return law


def write_corpus(path: Path, corpus: Corpus, seed: int, *, shuffled: bool) -> None:
    """Write one document a line; all of it follows from the seed."""
    law = symbol_law(corpus, seed)
    random = np.random.default_rng([seed, 2])
    with path.open("w") as file:
        for _ in range(corpus.documents):
            topics = random.integers(0, corpus.topics, size=corpus.segments if shuffled else 1)
            each = np.broadcast_to(topics, corpus.segments)
            drawn = [random.choice(corpus.symbols, corpus.length, p=law[z]) for z in each]
            text = "".join(string.ascii_letters[s] for s in np.concatenate(drawn))
            file.write(json.dumps({"text": text}) + "\n")


def best_nats(corpus: Corpus, seed: int, *, shuffled: bool, tokens: int, draws: int = 4000) -> float:
    """Nats per token of the first `tokens` of a next segment, for one who knows the laws and has read the segment
    before: the floor of every model, estimated over `draws` documents."""
    law = symbol_law(corpus, seed)
    random = np.random.default_rng([seed, 3])
    total = 0.0
    for _ in range(draws):
        z, later = random.integers(0, corpus.topics, size=2) if shuffled else [random.integers(0, corpus.topics)] * 2
        before = random.choice(corpus.symbols, corpus.length, p=law[z])
        log_posterior = np.zeros(corpus.topics) if shuffled else np.log(law[:, before]).sum(axis=1)
        for symbol in random.choice(corpus.symbols, tokens, p=law[later]):
            posterior = np.exp(log_posterior - log_posterior.max())
            total -= np.log(law[:, symbol] @ posterior / posterior.sum())
            log_posterior = log_posterior + np.log(law[:, symbol])
    return total / draws / tokens


def information(corpus: Corpus, seed: int, *, draws: int = 4000) -> float:
    """I(segment; next segment) in nats, estimated over `draws` pairs with the exact pointwise information."""
    law = np.log(symbol_law(corpus, seed))
    random = np.random.default_rng([seed, 4])
    total = 0.0
    for _ in range(draws):
        z = random.integers(0, corpus.topics)
        a, b = (law[:, random.choice(corpus.symbols, corpus.length, p=np.exp(law[z]))].sum(axis=1) for _ in range(2))
        total += _log_mean(a + b) - _log_mean(a) - _log_mean(b)
    return total / draws


def _log_mean(values: Floats) -> float:
    return float(np.log(np.exp(values - values.max()).mean()) + values.max())
