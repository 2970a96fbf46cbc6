"""What a generated task is: a frozen value that draws sequences and says where the answers stand.

A sequence is `tokens` and, beside them, `targets`: what a model should say at a position, and -100 where it is not
asked. Answers stand beside the text and not in it (copying aside, see there), so a model that looks both ways finds
them no easier. Nothing here imports torch.

Legend: t tokens of a sequence.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from clearhead.errors import UserError

IGNORE = -100
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Sample:
    """One sequence; all [t] int64."""

    tokens: Ints
    targets: Ints
    """The answer at each position that is asked; -100 elsewhere."""
    distance: Ints
    """How many tokens lie between an answer's position and what it follows from; -1 where there is no such number."""


@dataclass(frozen=True)
class Synthetic(ABC):
    """A task with its options. Subclasses add theirs, with defaults, and check them in `check`."""

    sequences: int = 256
    """Sequences of the validation set, and of the test set."""
    length: int = 0
    """Tokens of a sequence; 0 = the context. A model with a memory reads a longer one segment by segment."""

    name: ClassVar[str]
    chance: ClassVar[str]
    """In words: how often a guess is right."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise self.error(f"{field.name}: expected a finite number, got {value}")
        self.at_least("sequences", 1)
        self.at_least("length", 0)
        self.check()

    @property
    @abstractmethod
    def symbols(self) -> tuple[str, ...]:
        """The vocabulary; ids are places in it."""

    @abstractmethod
    def check(self) -> None:
        """Raise `UserError` for options that make no sense."""

    @abstractmethod
    def least(self) -> int:
        """The shortest sequence that holds the task."""

    @abstractmethod
    def draw(self, random: np.random.Generator, length: int, both_ways: bool) -> Sample:
        """Draw a sequence of `length` tokens, of which `least()` is the smallest. `both_ways`: the model may look
        ahead, so nothing that gives an answer away may follow it."""

    def check_context(self, context: int) -> None:
        """Raise `UserError` when sequences read `context` tokens at a time cannot hold the task."""
        self.check_length(self.length or context)
        if self.length % context:
            raise self.error(f"length: expected a multiple of the context {context}, got {self.length}")

    def check_length(self, length: int) -> None:
        """Raise `UserError` when a sequence of `length` tokens cannot hold the task."""
        if length < self.least():
            raise self.error(f"needs at least {self.least()} tokens, got {length}; raise the context")

    def options(self) -> dict[str, Any]:
        """Every option by name."""
        return dataclasses.asdict(self)

    def error(self, what: str) -> UserError:
        """The error for this task."""
        return UserError(f"synthetic:{self.name}: {what}")

    def at_least(self, name: str, least: int) -> None:
        """Check a number among the options."""
        value = getattr(self, name)
        if value < least:
            raise self.error(f"{name}: expected at least {least}, got {value}")

    def one_of(self, name: str, choices: tuple[str, ...]) -> None:
        """Check a word among the options."""
        value = getattr(self, name)
        if value not in choices:
            raise self.error(f"{name}: expected {' or '.join(choices)}, got {value!r}")

    def share(self, name: str) -> None:
        """Check a share among the options."""
        value = getattr(self, name)
        if not 0 < value < 1:
            raise self.error(f"{name}: expected a share between 0 and 1, got {value}")


def numbered(prefix: str, count: int) -> tuple[str, ...]:
    """Symbols such as k0 k1 k2."""
    return tuple(f"{prefix}{i}" for i in range(count))


def unanswered(tokens: Ints) -> Sample:
    """A sample without a question yet; its targets and distances are filled in place."""
    return Sample(tokens, np.full(tokens.shape, IGNORE, dtype=np.int64), np.full(tokens.shape, -1, dtype=np.int64))
