"""Next-token prediction on running text: the decoder's task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn as nn

from clearhead.data.cache import Progress
from clearhead.data.text import TextData, prepare
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.train.config import RunConfig
from clearhead.train.evaluate import EvalResult, evaluate
from clearhead.train.recorder import finite
from clearhead.train.step import MicroBatch
from clearhead.train.tasks.task import Stateless, finite_documents, text_micro_batches
from clearhead.train.world import World


class CausalLM(Stateless):
    """See `clearhead.train.tasks.task.Task`."""

    def __init__(self, config: RunConfig, data: TextData) -> None:
        self.config, self.data = config, data

    @classmethod
    def prepare(cls, config: RunConfig, progress: Progress | None) -> CausalLM:
        """Prepare the text."""
        return cls(config, prepare(config.data, progress=progress))

    def read(self, step: int, world: World) -> tuple[list[MicroBatch], int]:
        """See `Task.read`."""
        config = self.config
        batch = self.data.batch("train", config.train.batch_size, config.data.context, config.train.seed, step)
        micro_batches = text_micro_batches(config, world, batch.tokens, batch.targets, batch.segments, MicroBatch)
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
    ) -> EvalResult:
        """See `Task.evaluate`."""
        return evaluate(
            model, self.data, split, max_tokens=max_tokens, batch_size=batch_size, world=world, should_stop=should_stop
        )

    def test_summary(self, test: EvalResult | None) -> Mapping[str, Any]:
        """See `Task.test_summary`."""
        return {
            "test_bits_per_byte": None if test is None else finite(test.bits_per_byte),
            "test_perplexity": None if test is None else finite(test.perplexity),
            "test_nats_per_token": None if test is None else finite(test.nats_per_token),
            "test_tokens": None if test is None else test.tokens,
            "test_bytes": None if test is None else test.bytes,
            "test_documents": finite_documents(test),
        }
