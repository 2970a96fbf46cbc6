"""The marks that this library set itself for a CPU, and whether a record meets them.

Forward and backward, causal, float32, 512 to 2048 tokens; the median of the ratio within rounds is what counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LENGTHS = (512, 2048)


@dataclass(frozen=True)
class Target:
    """`name` takes at most `limit` times the baseline's time; or, with `than`, `than` takes at least `limit` times that
    of `name`."""

    words: str
    operation: str
    name: str
    limit: float
    than: str | None = None
    shortest: int = 0


BOTH, STEP = "forward+backward", "step"
TARGETS = (
    Target("laser, forward and backward, against SDPA", BOTH, "laser", 1.10),
    Target("softmax+selective, forward and backward, against SDPA", BOTH, "softmax+selective", 1.05),
    Target("self_adjust, forward and backward, against SDPA", BOTH, "self_adjust", 2.0),
    Target("self_adjust, the same, once tuned", BOTH, "self_adjust", 1.5),
    Target(
        "self_adjust written out, against self_adjust, from 1024 tokens",
        BOTH,
        "self_adjust",
        2.0,
        than="self_adjust written out",
        shortest=1024,
    ),
    Target("training step with laser, against softmax", STEP, "laser", 1.05),
    Target("training step with softmax+selective, against softmax", STEP, "softmax+selective", 1.05),
    Target("training step with self_adjust, against softmax", STEP, "self_adjust", 1.15),
)


@dataclass(frozen=True)
class Verdict:
    """What was measured for a target, by length or by model, and what that says."""

    target: Target
    measured: Mapping[str, float]

    @property
    def missed(self) -> list[str]:
        """Where it was not met."""
        at_least = self.target.than is not None
        return [
            where
            for where, ratio in self.measured.items()
            if (ratio < self.target.limit if at_least else ratio > self.target.limit)
        ]

    @property
    def words(self) -> str:
        """met, missed (and where), or not measured."""
        if not self.measured:
            return "not measured"
        if not self.missed:
            return "met"
        return "missed" if len(self.missed) == len(self.measured) else f"missed at {', '.join(self.missed)}"

    @property
    def limit(self) -> str:
        """The mark in words."""
        return f"{'≥' if self.target.than else '≤'} {self.target.limit:.2f}"


def judged(record: Mapping[str, Any]) -> bool:
    """Whether the marks are about what this record measured."""
    return record["plan"]["device"] == "cpu" and record["plan"]["dtype"] == "float32"


def verdicts(record: Mapping[str, Any]) -> list[Verdict]:
    """Every target beside what a record measured; none for another device or type."""
    if not judged(record):
        return []
    return [Verdict(target, _measured(target, record)) for target in TARGETS]


def _measured(target: Target, record: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for group in record["groups"]:
        if group["operation"] != target.operation:
            continue
        if target.operation != STEP and not max(LENGTHS[0], target.shortest) <= group["length"] <= LENGTHS[1]:
            continue
        own, other = group["results"].get(target.name), group["results"].get(target.than or target.name)
        if own is None or other is None:
            continue
        ratio = own["median_ratio"]
        found[group["on"] or str(group["length"])] = ratio if target.than is None else other["median_ratio"] / ratio
    return found
