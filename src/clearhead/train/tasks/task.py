"""What the training loop asks of a task. The loop, the step and the checkpoints are the same for all of them.

causal_lm     decoder    next token of running text             bits per byte
masked_lm     encoder    hidden tokens of running text          nats and accuracy per hidden token
translation   seq2seq    the next token of a translated text    nats per token, chrF, BLEU

With data.source=synthetic:... a decoder or an encoder learns the answers of a generated task instead, and is scored by
bits per answer and accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from torch import Tensor

from clearhead.data.cache import Progress
from clearhead.data.pairs import PairData
from clearhead.data.synthetic.source import SyntheticData
from clearhead.data.text import TextData
from clearhead.train.config import RunConfig
from clearhead.train.recorder import finite
from clearhead.train.step import Batch
from clearhead.train.world import World

B = TypeVar("B")


class Scored(Protocol):
    """What an evaluation found."""

    @property
    def nats(self) -> float:
        """Sum over everything scored."""
        ...

    def metrics(self) -> dict[str, float]:
        """The numbers of the validation curve; "loss" (nats per token) is among them."""
        ...


class Task(Protocol):
    """A task on prepared data."""

    @property
    def data(self) -> TextData | PairData | SyntheticData:
        """What was prepared; the loop reads its tokenizer and its fingerprint."""
        ...

    def read(self, step: int, world: World) -> tuple[Sequence[Batch], int]:
        """Return this process's micro-batches of a step and the number of targets that count in the whole step.

        A pure function of the config and the step: every process draws the whole step and takes its rows, so that the
        number needs no communication and the number of processes changes nothing.
        """
        ...

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
    ) -> Scored:
        """Score a split, or about `max_tokens` of it; `last`: at the end of the run, with the slow scores too."""
        ...

    def test_summary(self, test: Any) -> Mapping[str, Any]:
        """What `result.json` says of the test scores; None where there is no score yet."""
        ...

    def state(self, world: World) -> dict[str, Tensor]:
        """What goes from step to step beside the weights, of all processes; each must ask. Saved in checkpoints."""
        ...

    def restore(self, held: Mapping[str, Tensor], world: World) -> None:
        """Go on with what `state` gave."""
        ...

    def forget(self) -> None:
        """Let go of what a step left behind that was not finite."""
        ...


class Stateless:
    """A task whose steps hang on nothing but the weights."""

    def state(self, world: World) -> dict[str, Tensor]:
        """See `Task.state`."""
        return {}

    def restore(self, held: Mapping[str, Tensor], world: World) -> None:
        """See `Task.restore`."""

    def forget(self) -> None:
        """See `Task.forget`."""


def prepare_task(config: RunConfig, *, progress: Progress | None = None) -> Task:
    """Prepare the data of the config's task. Raises `UserError` when something that the task needs is missing."""
    task = _own_task(config, progress)
    if config.objective.reads_segments:
        from clearhead.train.tasks.segments import WithSegments

        return WithSegments(task, config)
    return task


def _own_task(config: RunConfig, progress: Progress | None) -> Task:
    if config.data.synthetic is not None and (config.model.memory or config.model.feedback_carry):
        from clearhead.train.tasks.synthetic_stream import SyntheticStream

        return SyntheticStream.prepare(config, progress)
    if config.data.synthetic is not None:
        from clearhead.train.tasks.synthetic import SyntheticTask

        return SyntheticTask.prepare(config, progress)
    if config.task == "translation":
        from clearhead.train.tasks.translation import Translation

        return Translation.prepare(config, progress)
    if config.task == "masked_lm":
        from clearhead.train.tasks.masked_lm import MaskedLM

        return MaskedLM.prepare(config, progress)
    if config.model.memory or config.model.feedback_carry:
        from clearhead.train.tasks.stream_lm import StreamLM

        return StreamLM.prepare(config, progress)
    from clearhead.train.tasks.causal_lm import CausalLM

    return CausalLM.prepare(config, progress)


def rows_of(config: RunConfig, world: World, index: int) -> slice:
    """Rows of a whole step's batch that micro-batch `index` of this process has."""
    rows = config.train.batch_size // (config.train.grad_accum * world.size)
    first = (index * world.size + world.rank) * rows
    return slice(first, first + rows)


def text_micro_batches(
    config: RunConfig,
    world: World,
    tokens: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    segments: npt.NDArray[np.int64],
    make: Callable[[Tensor, Tensor, Tensor | None], B],
) -> list[B]:
    """This process's micro-batches of a step of running text, all [b, t]; `make` takes tokens, targets and segments.

    Segments are None where no row holds a boundary, which lets attention take its plain path.
    """
    micro_batches = []
    for index in range(config.train.grad_accum):
        rows = rows_of(config, world, index)
        bounded = bool((segments[rows] != segments[rows, :1]).any())
        micro_batches.append(
            make(
                torch.from_numpy(tokens[rows]).to(world.device),
                torch.from_numpy(targets[rows]).to(world.device),
                torch.from_numpy(segments[rows]).to(world.device) if bounded else None,
            )
        )
    return micro_batches


def finite_documents(test: Any) -> list[dict[str, Any]] | None:
    """The documents of a test score as `result.json` holds them; None where there is no score yet."""
    if test is None:
        return None
    return [{key: finite(value) for key, value in document.to_dict().items()} for document in test.per_document]
