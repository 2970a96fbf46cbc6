"""What trains beside a model in one run and is no part of it: the critic of an objective.

Its parameters stand in optimizer groups of their own, are clipped apart from the model's, and are saved beside it, so
that a checkpoint's model stays what `clearhead.models.io.load_model` reads.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch.nn as nn


class Companion(Protocol):
    """A task has one as its attribute `companion`; `Alone` stands for none."""

    module: nn.Module
    columns: tuple[str, ...]
    """Names of what `measured` returns: a number of each step, kept in the run's history."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for `clearhead.train.optimizer.build_optimizer`."""
        ...

    def costs(self, model: nn.Module) -> dict[str, Any]:
        """What a step reads and computes on top of the task's, for the run's summary."""
        ...

    def begin(self, model: nn.Module) -> None:
        """Called once, before the first step of a run that is not gone on with: set the first weights of both."""
        ...

    def measured(self) -> dict[str, float]:
        """What the last step found."""
        ...

    def warnings(self, step: int) -> list[str]:
        """What a person should know about the last step; each thing once."""
        ...


class Alone:
    """Nothing trains beside the model."""

    def __init__(self) -> None:
        self.module = nn.Module()
        self.columns: tuple[str, ...] = ()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """See `Companion`."""
        return []

    def costs(self, model: nn.Module) -> dict[str, Any]:
        """See `Companion`."""
        return {}

    def begin(self, model: nn.Module) -> None:
        """See `Companion`."""

    def measured(self) -> dict[str, float]:
        """See `Companion`."""
        return {}

    def warnings(self, step: int) -> list[str]:
        """See `Companion`."""
        return []


def companion_of(task: object) -> Companion:
    """Return the task's companion; most tasks have none."""
    companion: Companion = getattr(task, "companion", None) or Alone()
    return companion
