"""What a bench was measured on."""

from __future__ import annotations

import datetime
import platform
from typing import Any

import torch

from clearhead.bench.registry import SOURCES
from clearhead.compare.environment import load_average as load_average
from clearhead.compare.environment import total_memory
from clearhead.train.environment import describe


def facts(device: torch.device) -> dict[str, Any]:
    """Machine, versions and date, as plain values."""
    known = describe(device)
    versions = {"Python": known["python"], "torch": known["torch"], "clearhead": known["clearhead"]}
    versions |= {one.name: one.version for one in SOURCES.values() if one.package is not None and one.version}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "processor": known["cpu"],
        "cores": known["cores"],
        "memory_bytes": total_memory(),
        "device": known["device"],
        "system": known["system"],
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": known["git_commit"],
    }


def cpu_model() -> str:
    """The processor's name."""
    return str(describe(torch.device("cpu"))["cpu"] or platform.machine())
