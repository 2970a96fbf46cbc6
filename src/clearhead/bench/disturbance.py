"""Whether a machine was quiet enough for the figures of a record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

QUIET_LOAD = 0.5
"""Runnable processes before the bench began, over the last minute. It adds one itself."""
QUIET_SHARE = 0.97
"""CPU time by wall time, below which somebody else had our core."""


def disturbances(record: Mapping[str, Any]) -> list[str]:
    """What speaks against the figures of a record, a sentence each; none on a quiet machine."""
    found = []
    before = record["load_before"]
    if before is not None and before[0] > QUIET_LOAD:
        found.append(f"the load was {before[0]:.2f} before it began, so other programs were running")
    if record["plan"]["device"] == "cpu":
        shared = _shares(record["groups"])
        if shared:
            worst = min(shared)
            found.append(
                f"in {len(shared)} of {len(record['groups'])} groups the core was shared: at worst {worst:.0%} was ours"
            )
    if record["plan"]["rounds"] < 9:
        found.append(f"{record['plan']['rounds']} rounds are fewer than the 9 that a figure needs")
    return found


def _shares(groups: Iterable[Mapping[str, Any]]) -> list[float]:
    return [group["cpu_share"] for group in groups if group["cpu_share"] < QUIET_SHARE]
