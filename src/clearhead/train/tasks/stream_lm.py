"""Next-token prediction with a memory: every row of the batch reads its own lane of the text, segment by segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from torch import Tensor

from clearhead.data.cache import Progress
from clearhead.data.text import TextData, prepare
from clearhead.memory.feedback import FeedbackState
from clearhead.memory.transformer_xl import SegmentMemory
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.train.config import RunConfig
from clearhead.train.evaluate import EvalResult
from clearhead.train.evaluate_stream import evaluate_stream
from clearhead.train.step import MemoryBatch
from clearhead.train.tasks.causal_lm import CausalLM
from clearhead.train.tasks.task import rows_of
from clearhead.train.world import World


class StreamLM(CausalLM):
    """See `clearhead.train.tasks.task.Task`. What goes from step to step is the memory of this process's rows."""

    def __init__(self, config: RunConfig, data: TextData) -> None:
        super().__init__(config, data)
        # Of each micro-batch; made at the first step, on its device.
        self.memories: list[SegmentMemory | FeedbackState] = []

    @classmethod
    def prepare(cls, config: RunConfig, progress: Progress | None) -> StreamLM:
        """Prepare the text."""
        return cls(config, prepare(config.data, progress=progress))

    def read(self, step: int, world: World) -> tuple[list[MemoryBatch], int]:  # type: ignore[override]
        """See `Task.read`: tokens are a function of the step; the memory is what the steps before it left."""
        config = self.config
        batch = self.data.lanes("train", config.train.batch_size, config.data.context, config.train.seed, step)
        micro_batches = self._with_memories(world, batch.tokens, batch.targets, batch.segments)
        return micro_batches, int((batch.targets != IGNORE).sum())

    def _with_memories(self, world: World, *whole_bt: npt.NDArray[np.int64]) -> list[MemoryBatch]:
        """This process's micro-batches of a step's tokens, targets and segments, each with the memory of its rows."""
        micro_batches = []
        for index, memory in enumerate(self._memories(world)):
            rows = rows_of(self.config, world, index)
            tokens_bt, targets_bt, segments_bt = (torch.from_numpy(x[rows]).to(world.device) for x in whole_bt)
            micro_batches.append(MemoryBatch(tokens_bt, targets_bt, segments_bt, memory))
        return micro_batches

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
        return evaluate_stream(
            model, self.data, split, max_tokens=max_tokens, batch_size=batch_size, world=world, should_stop=should_stop
        )

    def state(self, world: World) -> dict[str, Tensor]:
        """See `Task.state`: the memory of every row of the whole batch, whatever process has it."""
        memories = self._memories(world)
        whole: dict[str, Tensor] = {}
        for name, example in memories[0].state_dict().items():
            if name == "plain":
                whole[name] = example
                continue
            rows = example.new_zeros(self.config.train.batch_size, *example.shape[1:])
            for index, memory in enumerate(memories):
                rows[rows_of(self.config, world, index)] = memory.state_dict()[name]
            whole[name] = world.sum(rows)
        return whole

    def restore(self, held: Mapping[str, Tensor], world: World) -> None:
        """See `Task.restore`."""
        for index, memory in enumerate(self._memories(world)):
            rows = rows_of(self.config, world, index)
            memory.load_state_dict(
                {name: (t if name == "plain" else t[rows].contiguous()).to(world.device) for name, t in held.items()}
            )

    def forget(self) -> None:
        """See `Task.forget`."""
        for memory in self.memories:
            memory.reset()

    def _memories(self, world: World) -> list[SegmentMemory | FeedbackState]:
        if not self.memories:
            self.memories = [self._memory(world) for _ in range(self.config.train.grad_accum)]
        return self.memories

    def _memory(self, world: World) -> SegmentMemory | FeedbackState:
        config, model = self.config, self.config.own_model
        rows = config.train.batch_size // (config.train.grad_accum * world.size)
        if model.feedback_carry:
            return FeedbackState.allocate(rows, model.feedback_window, model.width, device=world.device)
        layout = model.memory_layout
        assert layout is not None  # `prepare_task` chose this task by it
        lengths = layout.lengths(model.layers, model.context)
        return SegmentMemory(lengths, rows, model.width, windowed=layout.windowed, device=world.device)
