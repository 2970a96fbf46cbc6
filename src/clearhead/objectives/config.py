"""What is learned beside a task's own loss: `ObjectiveConfig`, and its named recipes. Imports no torch.

    L = L_task + nsp * L_NSP + raml * L_RAML

A term of weight 0 is not there: nothing is read for it, and nothing computed. See docs/bmi.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from clearhead.errors import UserError, unknown

NspTrains = Literal["encoder+critic", "critic"]
CUTS = ("chunk", "sentence")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """BMI (arXiv 1905.11978) as two terms beside the task's loss. Raises `UserError` for a value that makes no sense.

    The defaults are those of the released code for WikiText-2 where models of this size allow it.
    """

    nsp: float = 0.0
    """Weight of next-segment prediction (alpha). 0 = no such term."""
    raml: float = 0.0
    """Weight of the importance-weighted likelihood of later segments (beta); needs `start`. 0 = no such term."""
    nsp_trains: NspTrains = "encoder+critic"
    """Where the gradient of next-segment prediction goes: encoder+critic (BMI) | critic (it measures the model and
    leaves it alone)."""
    segments: str = "chunk:40"
    """How documents are cut: chunk:N (N tokens each) | sentence:N (sentences, clipped to N tokens)."""
    pairs: int = 12
    """Pairs of segments in a step, whatever `train.batch_size` is."""
    pooled: str = "all"
    """Layers whose states make a segment's vector: all | last | last:N | a list such as 1,3 (from 1)."""
    temperature: float = 1.0
    """Of the weights exp((T(x, later) - T(x, next)) / temperature) / q: larger is flatter."""
    lookahead: float = 0.3
    """p of the geometric number of segments that a later segment lies behind the next one: q(k) ~ (1 - p)^k p."""
    critic_hidden: int = 100
    """Hidden size of the critic."""
    critic_dropout: float = 0.1
    """Dropout inside the critic."""
    critic_lr: float = 2e-4
    """Peak learning rate of the critic; it follows the run's schedule."""
    critic_weight_decay: float = 1e-6
    """Decay of the critic's parameters (decoupled; the released code adds it to the gradient)."""
    start: str | None = None
    """Folder of a run with nsp > 0 whose model and critic this run begins from."""

    def __post_init__(self) -> None:
        for name in ("nsp", "raml", "critic_weight_decay"):
            _number(name, getattr(self, name), least=0.0)
        for name in ("temperature", "critic_lr"):
            _number(name, getattr(self, name), above=0.0)
        _number("lookahead", self.lookahead, above=0.0)
        if self.lookahead > 1.0:
            raise UserError(f"objective.lookahead: expected a probability in (0, 1], got {self.lookahead}")
        _number("critic_dropout", self.critic_dropout, least=0.0)
        if self.critic_dropout >= 1.0:
            raise UserError(f"objective.critic_dropout: expected a share in [0, 1), got {self.critic_dropout}")
        for name, least in (("pairs", 2), ("critic_hidden", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"objective.{name}: expected a whole number of at least {least}, got {value!r}")
        if self.nsp_trains not in get_args(NspTrains):
            raise unknown("objective.nsp_trains", str(self.nsp_trains), get_args(NspTrains))
        parse_cut(self.segments)
        pooled_layers(self.pooled, None)
        if self.raml > 0.0 and self.start is None:
            raise UserError(
                "objective.raml: its weights come from a trained critic, and a fresh one knows nothing; set "
                "objective.start to the folder of a run with objective.nsp > 0"
            )
        if self.start is not None and not self.reads_segments:
            raise UserError("objective.start: nothing begins from it; set objective.nsp or objective.raml above 0")

    @property
    def reads_segments(self) -> bool:
        """Whether there is any term beside the task's loss."""
        return self.nsp > 0.0 or self.raml > 0.0

    @property
    def segment_length(self) -> int:
        """Tokens of a segment at most."""
        return parse_cut(self.segments)[1]

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; `from_dict` brings back an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ObjectiveConfig:
        """Build from plain values; an unknown key raises `UserError` with the nearest known one."""
        names = [entry.name for entry in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise unknown("key in objective", str(key), names)
        return cls(**values)


RECIPES: dict[str, dict[str, Any]] = {
    # The task's own loss alone.
    "plain": {},
    # BMI-base: next-segment prediction beside it.
    "bmi": {"nsp": 0.1},
    # BMI-full: both terms, from a run of "bmi"; --objective.start says which.
    "bmi-full": {"nsp": 0.1, "raml": 0.1},
}
"""Named objectives; what `clearhead train --objective NAME` begins from."""


def parse_cut(text: str) -> tuple[str, int]:
    """Read chunk:N or sentence:N into its name and number. Raises `UserError` otherwise."""
    name, _, number = str(text).partition(":")
    if name not in CUTS:
        raise unknown("cut of objective.segments", name, CUTS)
    if not number.isdigit() or int(number) < 1:
        raise UserError(f"objective.segments: expected {name}:N with a whole number of at least 1, got {text!r}")
    return name, int(number)


def pooled_layers(text: str, layers: int | None) -> tuple[int, ...]:
    """Read all | last | last:N | 1,3 into layer numbers from 1, for a stack of `layers`.

    `layers=None` checks the form alone. Raises `UserError` for another form and for layers that are not there.
    """
    expected = "expected all, last, last:N or layer numbers such as 1,3 (from 1)"
    name, colon, number = str(text).partition(":")
    if name == "all" and not colon:
        return tuple(range(1, (layers or 0) + 1))
    if name == "last":
        count = 1 if not colon else int(number) if number.isdigit() else 0
        if count < 1:
            raise UserError(f"objective.pooled: {expected}, got {text!r}")
        if layers is None:
            return ()
        chosen = tuple(range(layers - count + 1, layers + 1))
    else:
        parts = str(text).split(",")
        if not all(part.strip().isdigit() for part in parts):
            raise UserError(f"objective.pooled: {expected}, got {text!r}")
        chosen = tuple(sorted({int(part) for part in parts}))
    if chosen[0] < 1 or (layers is not None and chosen[-1] > layers):
        raise UserError(f"objective.pooled={text}: the model has layers 1 to {layers}")
    return chosen


def _number(name: str, value: object, *, above: float = -math.inf, least: float = -math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"objective.{name}: expected a finite number, got {value!r}")
    if not (value > above and value >= least):
        low = f"above {above:g}" if above > -math.inf else f"of at least {least:g}"
        raise UserError(f"objective.{name}: expected a number {low}, got {value}")
