"""`InitReport`: every parameter once, with its rule and the variance asked for and got, and the residual constants."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn as nn
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from clearhead.init.plan import Piece


@dataclass(frozen=True)
class Entry:
    """One parameter, or the part of a fused one that is one matrix."""

    parameter: str
    """Name in `model.named_parameters()`."""
    part: str
    """query | key | ... of a fused parameter; empty for a whole one."""
    rule: str
    draw: str
    """How it was drawn, as in N(0, 0.02); kept = left as it was."""
    count: int
    """Number of entries."""
    mean_asked: float | None
    variance_asked: float | None
    """None where nothing was asked (kept)."""
    mean: float | None
    """Got; None on the meta device, which holds no numbers."""
    variance: float | None

    @property
    def name(self) -> str:
        """The parameter, and which part of it."""
        return f"{self.parameter}[{self.part}]" if self.part else self.parameter


@dataclass(frozen=True)
class InitReport:
    """What `clearhead.init_` did. Print it for a table (layers of equal kind in one row), or read `entries`."""

    scheme: str
    entries: tuple[Entry, ...]
    residuals: Mapping[str, Mapping[str, float]]
    """By the place of each residual sum: its constants (stream_scale, branch_scale, omega), empty for plain sums."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the scheme read: correlations of the embedding, head scale, seed ..."""
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Entry:
        """The entry of that name; `KeyError` when there is none."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"init {self.scheme}", title_justify="left")
        for name in ("parameter", "number", "rule", "draw", "variance asked", "got / asked"):
            table.add_column(name, overflow="fold")
        for pattern, group in _grouped(self.entries).items():
            table.add_row(pattern, str(len(group)), *_described(group))
        yield table
        if self.residuals:
            table = Table(title="residual sums", title_justify="left")
            for name in ("place", "number", "constants"):
                table.add_column(name, overflow="fold")
            places: dict[tuple[str, ...], list[Mapping[str, float]]] = {}
            for place, values in self.residuals.items():
                places.setdefault((_pattern(place), *values), []).append(values)
            for (pattern, *names), found in places.items():
                texts = [f"{name} {_range([values[name] for values in found])}" for name in names]
                table.add_row(pattern, str(len(found)), ", ".join(texts))
            yield table
        for name, value in self.facts.items():
            yield f"{name}: {value:.6g}" if isinstance(value, float) else f"{name}: {value}"
        yield from self.notes

    def __str__(self) -> str:
        text = io.StringIO()
        Console(width=120, file=text).print(self)
        return text.getvalue()


def measure(model: nn.Module, pieces: Iterable[Piece]) -> tuple[Entry, ...]:
    """Read what every parameter became.

    Raises `RuntimeError` when the plan misses a parameter of the model, names one twice, or names a stranger.
    """
    pieces, parameters = list(pieces), dict(model.named_parameters())
    check_once(parameters, pieces)
    entries = []
    for piece in pieces:
        parameter = parameters[piece.parameter]
        tensor = piece.matrix.of(parameter.detach()) if piece.matrix is not None else parameter.detach()
        mean, variance = _moments(tensor)
        asked = None if piece.draw.kind == "kept" else piece.draw
        entries.append(
            Entry(
                parameter=piece.parameter,
                part=piece.part,
                rule=piece.rule,
                draw=str(piece.draw),
                count=tensor.numel(),
                mean_asked=None if asked is None else asked.mean,
                variance_asked=None if asked is None else asked.variance,
                mean=mean,
                variance=variance,
            )
        )
    return tuple(entries)


def check_once(parameters: Mapping[str, Tensor], pieces: Iterable[Piece]) -> None:
    """Raise `RuntimeError` unless the pieces cover every parameter exactly once."""
    covered = dict.fromkeys(parameters, 0)
    for piece in pieces:
        if piece.parameter not in covered:
            raise RuntimeError(f"init: the plan names {piece.parameter}, which the model does not have")
        part = piece.matrix
        parameter = parameters[piece.parameter]
        covered[piece.parameter] += parameter.numel() if part is None else part.weight().numel()
    for name, count in covered.items():
        if count != parameters[name].numel():
            how = "misses" if count < parameters[name].numel() else "names more than once"
            raise RuntimeError(f"init: the plan {how} {name}")


def _moments(tensor: Tensor) -> tuple[float | None, float | None]:
    if tensor.is_meta or not tensor.numel():
        return None, None
    gather = getattr(tensor, "full_tensor", None)
    values = (tensor if gather is None else gather()).double()
    mean = values.mean()
    return float(mean), float(((values - mean) ** 2).mean())


def _pattern(name: str) -> str:
    return re.sub(r"\.\d+(?=\.)", ".*", name, count=1)


def _grouped(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    groups: dict[str, list[Entry]] = {}
    for entry in entries:
        groups.setdefault(_pattern(entry.name), []).append(entry)
    return groups


def _described(group: list[Entry]) -> tuple[str, str, str, str]:
    rules = dict.fromkeys(entry.rule for entry in group)
    draws = dict.fromkeys(entry.draw for entry in group)
    asked = [entry.variance_asked for entry in group if entry.variance_asked is not None]
    ratios = [e.variance / e.variance_asked for e in group if e.variance is not None and e.variance_asked]
    return _ends(list(rules)), _ends(list(draws)), _range(asked), _range(ratios)


def _ends(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{texts[0]} ... {texts[-1]}"


def _range(values: Iterable[float]) -> str:
    numbers = [value for value in values if not math.isnan(value)]
    if not numbers:
        return ""
    low, high = min(numbers), max(numbers)
    return f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g} to {high:.4g}"


@torch.no_grad()
def residual_constants_of(model: nn.Module) -> dict[str, dict[str, float]]:
    """The constants of every residual rule in `model`, by place; a vector omega as its root mean square."""
    from clearhead.init.foreign import BranchRule, StreamRule
    from clearhead.layers.residual import ConstantOmegaSum, OmegaSum, ScaledSum

    found: dict[str, dict[str, float]] = {}
    for path, module in model.named_modules():
        place = path.removesuffix(".rule").removesuffix("_residual").removesuffix(".clearhead_rule")
        if isinstance(module, ScaledSum):
            names = {"stream_scale": module.stream_scale, "branch_scale": module.branch_scale}
        elif isinstance(module, OmegaSum | ConstantOmegaSum | StreamRule):
            names = {"omega": module.omega}
        elif isinstance(module, BranchRule):
            names = {"branch_scale": module.scale}
        else:
            continue
        found[place] = {name: _rms(value) for name, value in names.items()}
    return found


def _rms(value: Tensor) -> float:
    if value.is_meta:
        return math.nan
    gather = getattr(value, "full_tensor", None)
    return float((value if gather is None else gather()).double().square().mean().sqrt())
