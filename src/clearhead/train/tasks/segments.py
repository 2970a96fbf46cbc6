"""A task of running text with BMI beside it: the same text and loss, and pairs of segments on top.

    L = L_task + objective.nsp * L_NSP + objective.raml * L_RAML

The pairs of a step are a micro-batch of their own, whole whatever `train.grad_accum` is, since the weights of the
likelihood are normalised over all of them. They are cut from the training documents; validation and test text is cut
for scoring only. The critic trains beside the model (`Companion`): own optimizer group, own clipping, own files in
checkpoints. What is reported as loss stays the task's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.data.split import SPLITS
from clearhead.data.text import TextData
from clearhead.errors import UserError
from clearhead.objectives.bmi.cost import ExtraCost, extra_cost
from clearhead.objectives.bmi.critic import Critic
from clearhead.objectives.bmi.raml import LEAST_EFFECTIVE
from clearhead.objectives.bmi.segments import Pairs, Segments
from clearhead.objectives.bmi.terms import Terms, bmi_terms
from clearhead.objectives.config import pooled_layers
from clearhead.train import checkpoint as store
from clearhead.train.config import RunConfig
from clearhead.train.recorder import finite
from clearhead.train.score_segments import cut_split, score_next_segment
from clearhead.train.step import Batch
from clearhead.train.tasks.task import Scored, Task
from clearhead.train.world import World


def make_critic(config: RunConfig) -> Critic:
    """Return the critic of a run, as its seed draws it."""
    objective, model = config.objective, config.own_model
    size = len(pooled_layers(objective.pooled, model.layers)) * model.width
    return Critic(size, hidden=objective.critic_hidden, dropout=objective.critic_dropout, seed=config.train.seed)


def stored_critic(config: RunConfig, run: Path, device: torch.device) -> Critic | None:
    """Return the critic of a run's newest checkpoint; None for a run without one."""
    if not config.objective.reads_segments:
        return None
    found = store.read(store.newest_model(run))
    critic = make_critic(config)
    store.restore_model(critic, found.tensors[store.COMPANION])
    return critic.to(device).eval()


def extra_cost_of(model: Any, config: RunConfig) -> ExtraCost:
    """Return what a step of the run costs beside its task; zeros for a plain objective."""
    if not config.objective.reads_segments:
        return ExtraCost(0, 0.0)
    return extra_cost(model, make_critic(config), config.objective)


@dataclass(frozen=True)
class SegmentBatch:
    """The pairs of a step as the last micro-batch; see `clearhead.train.step.Batch`."""

    companion: SegmentCompanion
    pairs: Pairs
    valid_tokens: int
    """Targets of the whole step: the step divides by them, and the terms are means already."""

    def loss(self, called: nn.Module) -> tuple[Tensor, Tensor]:
        """See `Batch`: what is minimised is added to the task's loss, what is reported is not."""
        model = getattr(called, "_orig_mod", called)  # compiled or not, segments run as they are
        terms = self.companion.terms_of(model, self.pairs)
        return terms.added * self.valid_tokens, torch.zeros_like(terms.added.detach())


class SegmentCompanion:
    """The critic and what was measured with it; see `clearhead.train.companion.Companion`."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.objective = config, config.objective
        self.layers = pooled_layers(self.objective.pooled, config.own_model.layers)
        self.module = make_critic(config)
        self.columns = ("nsp", "nsp_accuracy") + (("raml", "effective_pairs") if self.objective.raml else ())
        self._last: Terms | None = None
        self._warned = False

    def terms_of(self, model: nn.Module, pairs: Pairs) -> Terms:
        """Compute and remember the terms of a step."""
        self._last = bmi_terms(model, self.module, pairs, self.objective, layers=self.layers)
        return self._last

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Companion`."""
        objective = self.objective
        return self.module.parameter_groups(
            lr_scale=objective.critic_lr / self.config.optim.lr, weight_decay=objective.critic_weight_decay
        )

    def costs(self, model: nn.Module) -> dict[str, Any]:
        """See `Companion`."""
        return extra_cost(model, self.module, self.objective).to_dict()

    def begin(self, model: nn.Module) -> None:
        """Take model and critic from the run that `objective.start` names, if it names one."""
        if self.objective.start is None:
            return
        folder = store.newest_model(Path(self.objective.start))
        found = store.read(folder)
        if store.COMPANION not in found.tensors:
            raise UserError(
                f"objective.start: {self.objective.start} has no critic; it must be a run with objective.nsp > 0"
            )
        try:
            store.restore_model(model, found.tensors[store.MODEL])
            store.restore_model(self.module, found.tensors[store.COMPANION])
        except store.Broken as problem:
            raise UserError(
                f"objective.start: {self.objective.start} does not fit this run: {problem}; give both runs the same "
                f"--model options, objective.pooled and objective.critic_hidden"
            ) from None

    def measured(self) -> dict[str, float]:
        """See `Companion`."""
        assert self._last is not None  # a step was done
        return self._last.measured()

    def warnings(self, step: int) -> list[str]:
        """Say once that the weights of a step rest on about one pair."""
        effective = None if self._last is None else self._last.effective
        if self._warned or effective is None or float(effective) >= LEAST_EFFECTIVE:
            return []
        self._warned = True
        return [
            f"step {step}: the weights of objective.raml rest on {float(effective):.2f} of {self.objective.pairs} "
            f"pairs (effective sample size below {LEAST_EFFECTIVE:g}); raise objective.temperature or objective.pairs"
        ]


@dataclass(frozen=True)
class SegmentScore:
    """A task's own score, and next-segment prediction on held-out documents beside it."""

    own: Scored
    nsp: float
    nsp_accuracy: float
    pairs: int

    @property
    def nats(self) -> float:
        """The task's own."""
        return self.own.nats

    def metrics(self) -> dict[str, float]:
        """The task's own, and `nsp` (nats), `nsp_accuracy`."""
        return {**self.own.metrics(), "nsp": self.nsp, "nsp_accuracy": self.nsp_accuracy}


class WithSegments:
    """A task with pairs of segments beside it; see `clearhead.train.tasks.task.Task`."""

    def __init__(self, task: Task, config: RunConfig) -> None:
        if not isinstance(task.data, TextData):
            raise UserError(f"objective: {config.task} reads pairs, which have no next segment; it takes plain alone")
        self.task, self.config, self.data = task, config, task.data
        self.companion = SegmentCompanion(config)
        cut = config.objective.segments
        # All splits at once: one that cannot be cut should end the run before it begins.
        self.segments: dict[str, Segments] = {
            split: cut_split(task.data, split, cut, task.data.tokenizer) for split in SPLITS
        }

    def read(self, step: int, world: World) -> tuple[Sequence[Batch], int]:
        """See `Task.read`."""
        batches, valid_tokens = self.task.read(step, world)
        objective = self.config.objective
        pairs = self.segments["train"].draw(
            objective.pairs, lookahead=objective.lookahead, seed=self.config.train.seed, step=step
        )
        return [*batches, SegmentBatch(self.companion, pairs, valid_tokens)], valid_tokens

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
    ) -> SegmentScore:
        """See `Task.evaluate`."""
        own = self.task.evaluate(
            model, split, max_tokens, batch_size=batch_size, world=world, should_stop=should_stop, last=last
        )
        loss, accuracy, pairs = score_next_segment(
            model, self.companion.module, self.segments[split], layers=self.companion.layers
        )
        return SegmentScore(own, loss, accuracy, pairs)

    def test_summary(self, test: SegmentScore | None) -> Mapping[str, Any]:
        """See `Task.test_summary`."""
        return {
            **self.task.test_summary(None if test is None else test.own),
            "test_nsp": None if test is None else finite(test.nsp),
            "test_nsp_accuracy": None if test is None else test.nsp_accuracy,
            "test_pairs": None if test is None else test.pairs,
        }

    def state(self, world: World) -> dict[str, Tensor]:
        """See `Task.state`: the task's own; the critic has its own files."""
        return self.task.state(world)

    def restore(self, held: Mapping[str, Tensor], world: World) -> None:
        """See `Task.restore`."""
        self.task.restore(held, world)

    def forget(self) -> None:
        """See `Task.forget`."""
        self.task.forget()
