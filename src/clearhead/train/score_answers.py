"""Nats and accuracy of a model on a generated task: at the positions that are asked, and by how far back the answer is.

Every model meets the same sequences: number 0 and on of a split. Legend: b rows, t tokens, V vocabulary, i bands.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clearhead.data.synthetic.source import SampleBatch, SyntheticData
from clearhead.memory.layout import MemoryLayout
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.train.evaluate import Float64, Interrupted, in_turns
from clearhead.train.world import World

_FIRST = 4  # the first band is 0 to 3 tokens, the next 4 to 7, and each further one twice as wide


@dataclass(frozen=True)
class Band:
    """The answers whose evidence lies `low` to `high` tokens back; both None where there is no such number."""

    low: int | None
    high: int | None
    answers: int
    nats: float
    right: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "from": self.low,
            "to": self.high,
            "answers": self.answers,
            "nats_per_answer": self.nats / self.answers,
            "accuracy": self.right / self.answers,
        }

    @property
    def words(self) -> str:
        """The band as a label."""
        return "no distance" if self.low is None else f"{self.low:,} to {self.high:,}"


@dataclass(frozen=True)
class AnswersResult:
    """The score of a split; every answer weighs alike."""

    split: str
    context: int
    """Tokens of a sequence."""
    sequences: int
    bands: tuple[Band, ...]
    """Only those that hold an answer."""

    @property
    def answers(self) -> int:
        """Positions that were asked."""
        return sum(band.answers for band in self.bands)

    @property
    def nats(self) -> float:
        """Sum over the answers."""
        return math.fsum(band.nats for band in self.bands)

    @property
    def nats_per_answer(self) -> float:
        """The training loss's unit."""
        return self.nats / self.answers

    @property
    def bits_per_answer(self) -> float:
        """The same in bits: what a comparison judges by."""
        return self.nats_per_answer / math.log(2)

    @property
    def accuracy(self) -> float:
        """Share of answers that were the first guess, among all symbols."""
        return sum(band.right for band in self.bands) / self.answers

    def metrics(self) -> dict[str, float]:
        """The numbers of the validation curve."""
        return {"bits_per_answer": self.bits_per_answer, "loss": self.nats_per_answer, "accuracy": self.accuracy}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "split": self.split,
            "accuracy": self.accuracy,
            "bits_per_answer": self.bits_per_answer,
            "nats_per_answer": self.nats_per_answer,
            "answers": self.answers,
            "sequences": self.sequences,
            "context": self.context,
            "by_distance": [band.to_dict() for band in self.bands],
        }


def score_answers(
    model: Any,
    data: SyntheticData,
    split: str,
    *,
    both_ways: bool,
    context: int | None = None,
    segment: int | None = None,
    layout: MemoryLayout | str | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    world: World | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> AnswersResult:
    """Score `model` on the sequences of a split, in its own dtype without autocast, sums in float64.

    Args:
        model: called as `model(tokens_bt)`, returns logits [b, t, V]; its training mode is put back afterwards.
        both_ways: whether the model may look ahead; decides how copies are asked for.
        context: tokens of a sequence; None = the data's own. Any length that holds the task will do.
        segment: read so many tokens at a time through the model's memory; None = a sequence at once, without memory.
        layout: with `segment`, a decoder's memory; None = the model's own.
        max_tokens: read about so many tokens (one sequence at least) instead of all.
        world: the processes that share the work; every one of them gets the whole result.
        should_stop: asked before every batch; `Interrupted` when it answers yes.
    """
    length = data.length if context is None else context
    count = data.task.sequences if max_tokens is None else min(data.task.sequences, max(1, max_tokens // length))
    highs = band_ends(length)
    sums_i3 = np.zeros((len(highs) + 1, 3))  # answers, nats, right guesses; the last row is for those without distance
    batches = [range(i, min(i + batch_size, count)) for i in range(0, count, batch_size)]
    was_training = model.training
    model.eval()
    try:
        for indices, counts in in_turns(batches, world):
            if should_stop():
                raise Interrupted
            batch = data.rows(split, indices, length, both_ways=both_ways)
            nats_n, right_n, distance_n = _score(model, batch, segment or length, layout, remember=segment is not None)
            if counts:
                band_n = np.where(distance_n < 0, len(highs), np.searchsorted(highs, distance_n))
                np.add.at(sums_i3, band_n, np.stack([np.ones_like(nats_n), nats_n, right_n], axis=1))
    finally:
        model.train(was_training)
    if world is not None and world.size > 1:
        sums_i3 = world.sum(torch.from_numpy(sums_i3).to(next(model.parameters()).device)).cpu().numpy()
    bands = []
    for i, (answers, nats, right) in enumerate(sums_i3):
        if answers:
            far = i == len(highs)
            low, high = (None, None) if far else (highs[i - 1] + 1 if i else 0, highs[i])
            bands.append(Band(low, high, int(answers), float(nats), int(right)))
    return AnswersResult(split, length, count, tuple(bands))


def band_ends(length: int) -> list[int]:
    """The last distance of each band: 3, 7, 15, 31, ... to the length."""
    ends = [_FIRST - 1]
    while ends[-1] < length - 1:
        ends.append(2 * ends[-1] + 1)
    return ends


@torch.no_grad()
def _score(
    model: Any, batch: SampleBatch, segment: int, layout: MemoryLayout | str | None, *, remember: bool
) -> tuple[Float64, Float64, Float64]:
    """Nats, whether the first guess was right, and the distance, of every answer of the batch, each [n]."""
    device = next(model.parameters()).device
    carried: dict[str, Any] = {}
    if remember and model.config.architecture == "feedback":
        carried = {"state": model.new_state(len(batch.tokens))}
    elif remember:
        carried = {"memory": model.new_memory(len(batch.tokens), layout)}
    parts: list[tuple[Float64, Float64, Float64]] = []
    for start in range(0, batch.tokens.shape[1], segment):
        here = slice(start, start + segment)
        targets_bt = torch.from_numpy(batch.targets[:, here]).to(device)
        asked_bt = targets_bt != IGNORE
        with torch.autocast(device.type, enabled=False):
            logits_nV = model(torch.from_numpy(batch.tokens[:, here]).to(device), **carried)[asked_bt].float()
            targets_n = targets_bt[asked_bt]
            nats_n = F.cross_entropy(logits_nV, targets_n, reduction="none")
        right_n = logits_nV.argmax(dim=-1) == targets_n
        distance_n = batch.distance[:, here][batch.targets[:, here] != IGNORE].astype(np.float64)
        parts.append((nats_n.cpu().double().numpy(), right_n.cpu().double().numpy(), distance_n))
    nats, right, distance = (np.concatenate(part) for part in zip(*parts, strict=True))
    return nats, right, distance
