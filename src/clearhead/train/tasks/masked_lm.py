"""Masked language modelling on running text: the encoder's task.

Batches are the decoder's windows of the packed stream; some of their tokens are hidden (`objectives/masked_lm.py`).
The mask token is the first id after the tokenizer's own. Separators are never hidden, and attention stays inside a
document.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn as nn
from torch import Tensor

from clearhead.data.cache import Progress
from clearhead.data.text import TextData, prepare
from clearhead.data.tokenizer import Tokenizer
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.objectives.masked_lm import mask_tokens, masked_lm_loss
from clearhead.train.config import RunConfig
from clearhead.train.recorder import finite
from clearhead.train.score_masked import MaskedResult, score_masked
from clearhead.train.tasks.task import Stateless, finite_documents, text_micro_batches
from clearhead.train.world import World


def mask_token(tokenizer: Tokenizer) -> int:
    """Return the id that stands for a hidden token."""
    return tokenizer.vocab_size


@dataclass(frozen=True)
class MaskedBatch:
    """What one forward pass reads; all [b, t] int64."""

    tokens_bt: Tensor
    targets_bt: Tensor
    """The hidden tokens; -100 elsewhere."""
    segments_bt: Tensor | None
    """Document numbers; None when no row holds a boundary."""

    def loss(self, called: nn.Module) -> tuple[Tensor, Tensor]:
        """See `clearhead.train.step.Batch`."""
        nats, _ = masked_lm_loss(called(self.tokens_bt, segments=self.segments_bt), self.targets_bt)
        return nats, nats


class MaskedLM(Stateless):
    """See `clearhead.train.tasks.task.Task`."""

    def __init__(self, config: RunConfig, data: TextData) -> None:
        self.config, self.data = config, data

    @classmethod
    def prepare(cls, config: RunConfig, progress: Progress | None) -> MaskedLM:
        """Prepare the text."""
        return cls(config, prepare(config.data, progress=progress))

    def read(self, step: int, world: World) -> tuple[list[MaskedBatch], int]:
        """See `Task.read`."""
        config, tokenizer = self.config, self.data.tokenizer
        batch = self.data.batch("train", config.train.batch_size, config.data.context, config.train.seed, step)
        masked = mask_tokens(
            batch.tokens,
            seed=config.train.seed,
            step=step,
            mask_token=mask_token(tokenizer),
            ordinary=tokenizer.vocab_size,
            special=[tokenizer.separator],
            fraction=config.train.mask_fraction,
        )
        micro_batches = text_micro_batches(config, world, masked.tokens, masked.targets, batch.segments, MaskedBatch)
        return micro_batches, int((masked.targets != IGNORE).sum())

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
    ) -> MaskedResult:
        """See `Task.evaluate`."""
        return score_masked(
            model,
            self.data,
            split,
            tokenizer=self.data.tokenizer,
            mask_token=mask_token(self.data.tokenizer),
            fraction=self.config.train.mask_fraction,
            max_tokens=max_tokens,
            batch_size=batch_size,
            world=world,
            should_stop=should_stop,
        )

    def test_summary(self, test: MaskedResult | None) -> Mapping[str, Any]:
        """See `Task.test_summary`."""
        return {
            "test_nats_per_token": None if test is None else finite(test.nats_per_token),
            "test_accuracy": None if test is None else test.accuracy,
            "test_tokens": None if test is None else test.tokens,
            "test_documents": finite_documents(test),
        }
