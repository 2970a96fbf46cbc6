"""`TemperatureOptions`: how the temperatures of a patched model look. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from clearhead.errors import UserError, unknown
from clearhead.models.choices import TEMPERATURE_GRANULARITIES, TEMPERATURE_PARTS, TEMPERATURE_SLOPES


@dataclass(frozen=True)
class TemperatureOptions:
    """Selective Self-Attention on a pretrained model: tau = 1 + tanh(f(projection)) + slope(n); see
    `clearhead.layers.temperature`.

    Raises `UserError` for a name that is not known, and for a temperature on keys.
    """

    granularity: str = "head_slice"
    """shared: one vector for all heads | head_slice: one per head over its own slice | head_full: one per head over all
    heads."""
    parts: str = "token+position"
    """token+position | token | position."""
    slope: str = "linear"
    """linear: beta ln n with beta from 0, exactly the identity at the start | sigmoid: sigmoid(alpha) ln n as in the
    paper, from a slope of 0.0113: the model's answers change a little at the start."""
    on: tuple[str, ...] = ("query", "value")
    """Which projections get one."""

    def __post_init__(self) -> None:
        for name, choices in (
            ("granularity", TEMPERATURE_GRANULARITIES),
            ("parts", TEMPERATURE_PARTS),
            ("slope", TEMPERATURE_SLOPES),
        ):
            if getattr(self, name) not in choices:
                raise unknown(f"temperature {name}", getattr(self, name), choices)
        on = tuple(self.on.split("+")) if isinstance(self.on, str) else tuple(self.on)
        if "key" in on:
            raise UserError(
                "a temperature on keys is not offered for pretrained models: it changes which key a query prefers, and "
                "a cache holds keys after rotary, where the projection that f reads is gone; use on=('query', 'value')"
            )
        if not on or any(name not in ("query", "value") for name in on) or len(set(on)) != len(on):
            raise UserError(f"temperature on: expected 'query', 'value' or both, got {self.on!r}")
        object.__setattr__(self, "on", tuple(name for name in ("query", "value") if name in on))

    @property
    def position(self) -> bool:
        """Whether positions are counted."""
        return "position" in self.parts

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "on": list(self.on)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TemperatureOptions:
        """Inverse of `to_dict`; raises `UserError` for a field that is not known."""
        names = [field.name for field in fields(cls)]
        for name in values:
            if name not in names:
                raise unknown("temperature option", name, names)
        return cls(**values)
