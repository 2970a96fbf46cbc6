"""Translation of sentence pairs: the encoder-decoder's task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.data.cache import Progress
from clearhead.data.pairs import PairBatch, PairData, prepare_pairs
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.objectives.seq2seq import seq2seq_loss
from clearhead.train.config import RunConfig
from clearhead.train.recorder import finite
from clearhead.train.score_pairs import TranslationResult, require_sacrebleu, score_pairs
from clearhead.train.tasks.task import Stateless, rows_of
from clearhead.train.world import World


@dataclass(frozen=True)
class PairMicroBatch:
    """What one forward pass reads; int64 [b, s] and [b, t], bool `source_valid`."""

    source_bs: Tensor
    source_valid_bs: Tensor | None
    """None when no row is padded."""
    tokens_bt: Tensor
    targets_bt: Tensor
    """The next tokens; -100 is ignored."""
    smoothing: float

    def loss(self, called: nn.Module) -> tuple[Tensor, Tensor]:
        """See `clearhead.train.step.Batch`: what is minimised is smoothed, what is reported is not."""
        logits_btV = called(self.source_bs, self.tokens_bt, source_valid=self.source_valid_bs)
        smoothed, nats, _ = seq2seq_loss(logits_btV, self.targets_bt, smoothing=self.smoothing)
        return smoothed, nats


class Translation(Stateless):
    """See `clearhead.train.tasks.task.Task`."""

    def __init__(self, config: RunConfig, data: PairData) -> None:
        self.config, self.data = config, data

    @classmethod
    def prepare(cls, config: RunConfig, progress: Progress | None) -> Translation:
        """Prepare the pairs. Raises `UserError` when sacrebleu is missing: better before the run than after it."""
        require_sacrebleu()
        return cls(config, prepare_pairs(config.data, progress=progress))

    def read(self, step: int, world: World) -> tuple[list[PairMicroBatch], int]:
        """See `Task.read`."""
        config = self.config
        batch = self.data.batch("train", config.train.batch_size, config.data.context, config.train.seed, step)
        micro_batches = [
            self._micro_batch(batch, rows_of(config, world, index), world) for index in range(config.train.grad_accum)
        ]
        return micro_batches, int((batch.targets != IGNORE).sum())

    def _micro_batch(self, batch: PairBatch, rows: slice, world: World) -> PairMicroBatch:
        parts = (batch.source, batch.source_valid, batch.tokens, batch.targets)
        source, valid, tokens, targets = (torch.from_numpy(x[rows]).to(world.device) for x in parts)
        return PairMicroBatch(
            source, None if bool(batch.source_valid[rows].all()) else valid, tokens, targets,
            self.config.train.label_smoothing,
        )  # fmt: skip

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
    ) -> TranslationResult:
        """See `Task.evaluate`. Only the last evaluation translates; every process does all of it, so none waits."""
        train = self.config.train
        return score_pairs(
            model,
            self.data,
            split,
            max_tokens=max_tokens,
            batch_size=batch_size,
            beams=train.beams if last else None,
            length_penalty=train.length_penalty,
            should_stop=should_stop,
        )

    def test_summary(self, test: TranslationResult | None) -> Mapping[str, Any]:
        """See `Task.test_summary`."""
        names = ("pairs", "tokens", "chrf", "bleu", "chrf_signature", "bleu_signature", "beams", "left_out", "examples")
        values = {} if test is None else test.to_dict()
        return {"test_nats_per_token": None if test is None else finite(test.nats_per_token)} | {
            f"test_{name}": values.get(name) for name in names
        }
