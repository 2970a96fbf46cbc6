"""Batches of a generated task: `SyntheticData`, which the training loop reads where it reads `TextData` of text.

Sequence number i of a split is drawn by a generator of its own, from (seed, split, i): which machine draws it, in which
batch, and what was drawn before are all one, so a resumed run goes on with the same sequences. Training draws from the
run's seed and never repeats; validation and test are `sequences` sequences each, drawn from `data.split_seed`, the same
for every run. Splits differ because their generators do; nothing keeps two draws from being equal by chance, which
matters only where a task has few sequences (a short one of few symbols).

Legend: b rows, t tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.cache import json_sha256
from clearhead.data.config import DataConfig
from clearhead.data.split import SPLITS, Split
from clearhead.data.symbols import SymbolTokenizer
from clearhead.data.synthetic.task import IGNORE, Sample
from clearhead.errors import UserError, unknown

FORMAT = 1
"""Counts up when a draw changes, so that a run is not gone on with on other sequences."""
_SALT = 0x10_4E_ED1E  # apart from every other use of a seed
_SEEN = 32  # sequences that stand for all where tokens are only counted


@dataclass(frozen=True)
class SampleBatch:
    """Rows of `Sample`, int64, each [b, t]."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    """The answer at each position that is asked; -100 elsewhere."""
    distance: npt.NDArray[np.int64]
    """Tokens from what an answer follows from; -1 where there is no such number."""


class SyntheticData:
    """A generated task at a context. Raises `UserError` when `config` names none."""

    def __init__(self, config: DataConfig) -> None:
        task = config.synthetic
        if task is None:
            raise UserError(f"data.source={config.source} is text, not a generated task")
        self.config, self.task = config, task
        self.tokenizer = SymbolTokenizer(task.symbols)
        self.vocab_size = self.tokenizer.vocab_size
        self._open: dict[int, tuple[tuple[Any, ...], Sample]] = {}  # of `lanes`: what each row is in the middle of
        about = {"format": FORMAT, "task": task.name, "options": task.options(), "split_seed": config.split_seed}
        self.fingerprint = json_sha256(about)
        """Equal for two runs whose sequences of equal seed and length are equal."""

    @property
    def summary(self) -> dict[str, Any]:
        """What a report says about the data, with the keys of `TextData.summary`."""
        count, options = self.task.sequences, self.task.options()
        each = {"documents": count, "tokens": count * self.length, "bytes": 0}
        return {
            "source": f"synthetic:{self.task.name} ({', '.join(f'{k}={v}' for k, v in options.items())})",
            "licence": "generated here",
            "split": {"by": "draw", "how": "every sequence drawn by its own seed; training never meets one twice"},
            "splits": {"train": dict.fromkeys(each, 0), "val": each, "test": dict(each)},
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "notes": [f"a guess is right: {self.task.chance}"],
        }

    @property
    def length(self) -> int:
        """Tokens of a sequence, unless another length is asked for."""
        return self.task.length or self.config.context

    def sample(
        self, split: str, index: int, *, length: int | None = None, seed: int = 0, both_ways: bool = False
    ) -> Sample:
        """Draw sequence `index` of a split, `length` tokens (None = the config's). `seed` is for training alone.

        Raises `UserError` for another split or a length too short, `ValueError` for an index or seed below 0.
        """
        length = self.length if length is None else length
        self.task.check_length(length)
        name = _split(split)
        if index < 0 or seed < 0:
            raise ValueError(f"expected index >= 0 and seed >= 0, got {index} and {seed}")
        key = [_SALT, seed if name == "train" else self.config.split_seed, SPLITS.index(name), index]
        return self.task.draw(np.random.default_rng(key), length, both_ways)

    def batch(
        self, split: str, batch_size: int, context: int, seed: int, step: int, *, both_ways: bool = False
    ) -> SampleBatch:
        """The batch of one step: sequences step * batch_size and on. See `sample`."""
        return self.rows(split, range(step * batch_size, (step + 1) * batch_size), context, seed, both_ways=both_ways)

    def lanes(
        self, split: str, batch_size: int, context: int, seed: int, step: int
    ) -> tuple[SampleBatch, npt.NDArray[np.int64]]:
        """The batch of one step for a model with a memory, and the number of the sequence that each row reads, [b].

        A row reads a sequence in `length / context` steps, `context` tokens at a time, then the next one. Rows begin at
        different parts, evenly spread, so that a step has answers even where they all stand at a sequence's end; what
        a row is asked about a first sequence whose beginning it never met does not count.
        """
        if self.length % context:
            raise self.task.error(f"length: expected a multiple of the segment {context}, got {self.length}")
        parts = self.length // context
        ahead_b = np.arange(batch_size) * parts // batch_size
        number_b, part_b = np.divmod(step + ahead_b, parts)
        pieces = []
        for row, (number, part) in enumerate(zip(number_b.tolist(), part_b.tolist(), strict=True)):
            key = (split, seed, self.length, number * batch_size + row)
            if row not in self._open or self._open[row][0] != key:
                self._open[row] = key, self.sample(split, key[-1], seed=seed)
            whole, here = self._open[row][1], slice(part * context, (part + 1) * context)
            targets = whole.targets[here] if number or not ahead_b[row] else np.full(context, IGNORE, dtype=np.int64)
            pieces.append((whole.tokens[here], targets, whole.distance[here]))
        return SampleBatch(*(np.stack(one) for one in zip(*pieces, strict=True))), number_b

    def rows(self, split: str, indices: range, length: int, seed: int = 0, *, both_ways: bool = False) -> SampleBatch:
        """Some sequences as a batch. See `sample`."""
        drawn = [self.sample(split, i, length=length, seed=seed, both_ways=both_ways) for i in indices]
        return SampleBatch(
            *(np.stack([getattr(one, part) for one in drawn]) for part in ("tokens", "targets", "distance"))
        )

    def stream(self, split: str) -> npt.NDArray[np.int64]:
        """Tokens of some sequences of a split in a row: for counting how often tokens occur."""
        return self.rows(split, range(_SEEN), self.length).tokens.reshape(-1)


def _split(name: str) -> Split:
    for split in SPLITS:
        if name == split:
            return split
    raise unknown("split", name, SPLITS)
