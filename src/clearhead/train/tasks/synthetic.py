"""A generated task (`clearhead.data.synthetic`): a decoder or an encoder learns the answers, and nothing but them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.data.cache import Progress
from clearhead.data.synthetic.source import SyntheticData
from clearhead.errors import UserError
from clearhead.objectives.cross_entropy import IGNORE, summed_nats
from clearhead.train.config import RunConfig
from clearhead.train.recorder import finite
from clearhead.train.score_answers import AnswersResult, score_answers
from clearhead.train.step import Batch
from clearhead.train.tasks.task import Stateless, rows_of
from clearhead.train.world import World


@dataclass(frozen=True)
class AnswerBatch:
    """What one forward pass reads; [b, t] int64."""

    tokens_bt: Tensor
    targets_bt: Tensor
    """The answer at each position that is asked; -100 elsewhere."""
    segments_bt: None = None
    """A row is one sequence."""

    def loss(self, called: nn.Module) -> tuple[Tensor, Tensor]:
        """See `clearhead.train.step.Batch`."""
        nats, _ = summed_nats("answers", called(self.tokens_bt), self.targets_bt)
        return nats, nats


class SyntheticTask(Stateless):
    """See `clearhead.train.tasks.task.Task`. Only the positions that are asked are learned and scored."""

    def __init__(self, config: RunConfig, data: SyntheticData) -> None:
        self.config, self.data = config, data
        self.both_ways = config.task == "masked_lm"

    @classmethod
    def prepare(cls, config: RunConfig, progress: Progress | None) -> SyntheticTask:
        """Nothing is kept on the disk."""
        data = SyntheticData(config.data)
        if data.length != config.data.context:
            raise UserError(
                f"{config.data.source}: a length of {data.length} is read segment by segment, which needs a memory "
                f"(--memory full:{data.length}); or leave length out, or set it to the context {config.data.context}"
            )
        return cls(config, data)

    def read(self, step: int, world: World) -> tuple[list[Batch], int]:
        """See `Task.read`."""
        train = self.config.train
        batch = self.data.batch(
            "train", train.batch_size, self.config.data.context, train.seed, step, both_ways=self.both_ways
        )
        micro_batches: list[Batch] = []
        for index in range(train.grad_accum):
            rows = rows_of(self.config, world, index)
            tokens_bt, targets_bt = (torch.from_numpy(x[rows]).to(world.device) for x in (batch.tokens, batch.targets))
            micro_batches.append(AnswerBatch(tokens_bt, targets_bt))
        return micro_batches, int((batch.targets != IGNORE).sum())

    def evaluate(
        self,
        model: nn.Module,
        split: str,
        max_tokens: int | None,
        *,
        batch_size: int,
        world: World,
        should_stop: Callable[[], bool],
        last: bool,
    ) -> AnswersResult:
        """See `Task.evaluate`."""
        return score_answers(
            model,
            self.data,
            split,
            both_ways=self.both_ways,
            max_tokens=max_tokens,
            batch_size=batch_size,
            world=world,
            should_stop=should_stop,
        )

    def test_summary(self, test: AnswersResult | None) -> Mapping[str, Any]:
        """See `Task.test_summary`."""
        return answers_summary(test)


def answers_summary(test: AnswersResult | None) -> Mapping[str, Any]:
    """What `result.json` says of the test answers."""
    return {
        "test_bits_per_answer": None if test is None else finite(test.bits_per_answer),
        "test_nats_per_answer": None if test is None else finite(test.nats_per_answer),
        "test_accuracy": None if test is None else test.accuracy,
        "test_answers": None if test is None else test.answers,
        "test_by_distance": None
        if test is None
        else [{key: finite(value) for key, value in band.to_dict().items()} for band in test.bands],
    }
