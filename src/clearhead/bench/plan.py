"""What is measured, as frozen values that travel to other processes and into the JSON file. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clearhead.attention.spec import AttentionSpec
from clearhead.bench.registry import DEFAULT_SPECS, OPERATIONS, QUICK_SPECS, SOURCES, Competitor, competitors
from clearhead.compare.plan import PRESETS as COMPARE_PRESETS
from clearhead.errors import UserError, unknown
from clearhead.models.config import PRESETS, ModelConfig
from clearhead.train.config import OptimConfig

DTYPES = ("float32", "bfloat16", "float16", "float64")
LEAST_ROUNDS = 9
"""Fewer give no figure that could be quoted."""
MOST_ROUNDS = 51


@dataclass(frozen=True)
class Shape:
    """Queries, keys and values [batch, heads, length, head_dim] of one attention; causal."""

    batch: int
    heads: int
    length: int
    head_dim: int
    dtype: str = "float32"
    device: str = "cpu"

    @property
    def text(self) -> str:
        """For titles."""
        return f"{self.batch} x {self.heads} heads x {self.length} x {self.head_dim}, {self.dtype}"


@dataclass(frozen=True)
class Model:
    """The decoder of a training step, and its batch."""

    name: str
    config: ModelConfig
    batch_size: int
    optim: OptimConfig
    device: str = "cpu"

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return self.config.context

    @property
    def text(self) -> str:
        """For titles."""
        c = self.config
        return f"{c.layers} layers x {c.width}, {c.heads} heads, context {c.context}, batch {self.batch_size}"


def _compare_model() -> Model:
    base = COMPARE_PRESETS["default"].base
    assert isinstance(base.model, ModelConfig)
    return Model("compare", base.model, base.train.batch_size, base.optim)


MODELS: dict[str, Model] = {
    "compare": _compare_model(),
    "small": Model("small", dataclasses.replace(PRESETS["small"], vocab_size=257), 8, OptimConfig()),
}
"""compare: what `clearhead compare` trains unless told otherwise | small: `clearhead train --model small`, batch 8."""

RIVALS = tuple(name for name in SOURCES if name not in ("torch", "clearhead"))
DEFAULT_RIVALS = tuple(name for name in RIVALS if name != "compiled")


@dataclass(frozen=True)
class Group:
    """What is timed in turns with each other: one operation on one shape, or on one model."""

    operation: str
    on: Shape | Model
    competitors: tuple[Competitor, ...]

    @property
    def title(self) -> str:
        """For people."""
        name = f"{self.on.name}: " if isinstance(self.on, Model) else ""
        return f"{OPERATIONS[self.operation].title}, {name}{self.on.text}"

    @property
    def baseline(self) -> str:
        """The competitor that ratios are taken to."""
        return OPERATIONS[self.operation].baseline


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A whole bench. Raises `UserError` for what makes no sense."""

    operations: tuple[str, ...] = tuple(OPERATIONS)
    specs: tuple[str, ...] = DEFAULT_SPECS
    rivals: tuple[str, ...] = DEFAULT_RIVALS
    """Names of sources."""
    lengths: tuple[int, ...] = (512, 1024, 2048)
    models: tuple[str, ...] = tuple(MODELS)
    rounds: int = LEAST_ROUNDS
    """At least so many of each group."""
    seconds: float = 4.0
    """A group that has its rounds goes on until it has taken so long, to at most `MOST_ROUNDS` rounds."""
    batch: int = 1
    heads: int = 4
    head_dim: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    memory: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for kind, names, known in (
            ("operation", self.operations, OPERATIONS),
            ("rival", self.rivals, RIVALS),
            ("model", self.models, MODELS),
            ("dtype", (self.dtype,), DTYPES),
        ):
            for name in names:
                if name not in known:
                    raise unknown(kind, name, known)
        for text in self.specs:
            AttentionSpec.parse(text)
        for kind, found in (("operation", self.operations), ("length", self.lengths), ("model", self.models)):
            if not found or len(set(found)) != len(found):
                raise UserError(f"bench: expected at least one {kind}, each once, got {', '.join(map(str, found))}")
        if min(self.lengths) < 2 or min(self.batch, self.heads, self.head_dim) < 1:
            raise UserError("bench: expected lengths of at least 2, and batch, heads and head size of at least 1")
        if self.rounds < 3:
            raise UserError(
                f"bench: expected at least 3 rounds ({LEAST_ROUNDS} for a figure to quote), got {self.rounds}"
            )

    def groups(self) -> list[Group]:
        """All that is timed together, cheap first within an operation."""
        everyone = competitors(self.specs, self.rivals)
        found = []
        for operation in OPERATIONS:
            if operation not in self.operations:
                continue
            on: Sequence[Shape | Model] = [MODELS[name] for name in self.models]
            if operation == "step":
                on = [dataclasses.replace(model, device=self.device) for model in on if isinstance(model, Model)]
            else:
                on = [
                    Shape(self.batch, self.heads, length, self.head_dim, self.dtype, self.device)
                    for length in sorted(self.lengths)
                ]
            own = [one for one in everyone if operation in one.operations]
            own.sort(key=lambda one: one.name != OPERATIONS[operation].baseline)
            found += [Group(operation, where, tuple(own)) for where in on]
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


def quick() -> Plan:
    """Four attentions at one length, and the small training step: under half a minute."""
    return Plan(specs=QUICK_SPECS, lengths=(512,), models=("compare",), seconds=0.5, memory=False)
