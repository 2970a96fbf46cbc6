"""A number of each step, kept for the whole run: what the summary and the logged means are computed from."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from clearhead.train.checkpoint import HISTORY

COLUMNS = ("loss", "grad_norm", "skipped", "valid_tokens", "seconds", "cpu_seconds")
SPIKE_FACTOR = 10.0
SPIKE_WINDOW = 100


class History:
    """Columns of equal length, one entry for each step. Losses are nats per valid token."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        """`more`: names of further columns, of what trains beside the model."""
        self.names = (*COLUMNS, *more)
        self._columns = {name: array("d") for name in self.names}
        self._totals = dict.fromkeys(self.names, 0.0)

    def __len__(self) -> int:
        return len(self._columns["loss"])

    def add(self, **values: float) -> None:
        """Append one step; every column must be given."""
        for name, column in self._columns.items():
            column.append(values[name])
            self._totals[name] += values[name]

    def column(self, name: str) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return a copy of a column, [steps]."""
        return np.array(self._columns[name], dtype=np.float64)

    def total(self, name: str) -> float:
        """Return the sum of a column."""
        return self._totals[name]

    def last(self, steps: int) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
        """Return the last `steps` entries of every column."""
        return {name: np.array(column[-steps:]) for name, column in self._columns.items()}

    def file(self) -> dict[str, bytes]:
        """Return the columns as a checkpoint's file."""
        return {HISTORY: save({name: torch.from_numpy(self.column(name)) for name in self.names})}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take the columns of a checkpoint."""
        self._columns = {name: array("d", tensors[name].tolist()) for name in self.names}
        self._totals = {name: float(sum(column)) for name, column in self._columns.items()}


def gradient_statistics(norms: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, Any]:
    """Return median, p99 and max of the finite norms, and how many stood above 10 times their running median.

    The running median is that of the up to 100 finite norms before a step (at least 10 of them).
    """
    finite = norms[np.isfinite(norms)]
    if not finite.size:
        return {"median": None, "p99": None, "max": None, "spikes": 0, "not_finite": int(norms.size)}
    spikes = sum(
        finite[i] > SPIKE_FACTOR * np.median(finite[max(0, i - SPIKE_WINDOW) : i]) for i in range(10, finite.size)
    )
    return {
        "median": float(np.median(finite)),
        "p99": float(np.quantile(finite, 0.99)),
        "max": float(finite.max()),
        "spikes": int(spikes),
        "not_finite": int(norms.size - finite.size),
    }
