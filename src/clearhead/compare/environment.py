"""The machine and the versions that a comparison ran on, as plain values for the report."""

from __future__ import annotations

import datetime
import os
from typing import Any

from clearhead.train.config import RunConfig


def describe(config: RunConfig) -> dict[str, Any]:
    """Return machine, cores, memory, device, versions, source commit, load and date; None where it cannot be known."""
    from clearhead.train import environment
    from clearhead.train.world import choose_device

    facts = environment.describe(choose_device(config.train.device, 0))
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": facts["cpu"],
        "cores": facts["cores"],
        "memory_bytes": total_memory(),
        "device": facts["device"],
        "system": facts["system"],
        "versions": {"Python": facts["python"], "torch": facts["torch"], "clearhead": facts["clearhead"]},
        "commit": facts["git_commit"],
        "load_average": load_average(),
    }


def load_average() -> list[float] | None:
    """Return the mean number of runnable processes over 1, 5 and 15 minutes."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else None


def usable_cores() -> int:
    """Return the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return max(1, os.cpu_count() or 1)


def total_memory() -> int | None:
    """Return the machine's memory in bytes."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
