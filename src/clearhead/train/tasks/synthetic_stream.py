"""A generated task for a decoder with a memory: sequences longer than a segment, read segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn as nn

from clearhead.data.cache import Progress
from clearhead.data.synthetic.source import SyntheticData
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.train.config import RunConfig
from clearhead.train.score_answers import AnswersResult, score_answers
from clearhead.train.step import MemoryBatch
from clearhead.train.tasks.stream_lm import StreamLM
from clearhead.train.tasks.synthetic import answers_summary
from clearhead.train.world import World


class SyntheticStream(StreamLM):
    """See `clearhead.train.tasks.task.Task`. The memory is kept, saved and put back as that of running text is."""

    data: SyntheticData  # type: ignore[assignment]

    def __init__(self, config: RunConfig, data: SyntheticData) -> None:
        super().__init__(config, data)  # type: ignore[arg-type]

    @classmethod
    def prepare(cls, config: RunConfig, progress: Progress | None) -> SyntheticStream:
        """Nothing is kept on the disk."""
        return cls(config, SyntheticData(config.data))

    def read(self, step: int, world: World) -> tuple[list[MemoryBatch], int]:  # type: ignore[override]
        """See `Task.read`."""
        train, context = self.config.train, self.config.data.context
        batch, number_b = self.data.lanes("train", train.batch_size, context, train.seed, step)
        segments_bt = number_b[:, None].repeat(context, axis=1)
        micro_batches = self._with_memories(world, batch.tokens, batch.targets, segments_bt)
        return micro_batches, int((batch.targets != IGNORE).sum())

    def evaluate(  # type: ignore[override]
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
            both_ways=False,
            segment=self.config.data.context,
            max_tokens=max_tokens,
            batch_size=batch_size,
            world=world,
            should_stop=should_stop,
        )

    def test_summary(self, test: AnswersResult | None) -> Mapping[str, Any]:  # type: ignore[override]
        """See `Task.test_summary`."""
        return answers_summary(test)
