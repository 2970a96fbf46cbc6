"""Times that mean something on a shared machine: ratios, taken within rounds.

Every round times each competitor once, in a new order, so that what slows the machine for a while slows all of that
round alike; a ratio is a time divided by the baseline's of the same round. A competitor that takes less than
`SHORTEST` is called several times in a row and the mean counts. On a CPU the clock is the CPU time of the process,
which has one thread: time that other processes took away does not count, what they did to the caches still does. On a
GPU the device is waited for before and after, and the clock is the wall's.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

SHORTEST = 2e-3
MOST_REPEATS = 50
LONG = 0.2
"""Seconds of a first run, loading of kernels and all, from which on a call is surely not repeated."""
Run = Callable[[], object]


@dataclass(frozen=True)
class Clock:
    """How seconds are read."""

    read: Callable[[], float]
    wait: Callable[[], object]
    words: str

    @classmethod
    def of(cls, device: torch.device) -> Clock:
        """The clock of a device."""
        if device.type == "cpu":
            return cls(time.process_time, lambda: None, "CPU time of the process, one thread")
        wait: dict[str, Callable[[], object]] = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}
        return cls(time.perf_counter, wait[device.type], f"wall time, {device.type} waited for before and after")

    def seconds(self, run: Run, repeats: int) -> float:
        """Mean seconds of a call."""
        self.wait()
        began = self.read()
        for _ in range(repeats):
            run()
        self.wait()
        return (self.read() - began) / repeats


@dataclass(frozen=True)
class Times:
    """Seconds of each competitor in each round, and what the machine did meanwhile."""

    seconds: dict[str, list[float]]
    cpu_share: float
    """CPU time by wall time: below 1 the core was shared (on a GPU: the share that the host was busy)."""


def interleaved(
    runs: Mapping[str, Run],
    clock: Clock,
    *,
    rounds: int,
    most: int,
    seconds: float,
    seed: int,
    first: Mapping[str, float] | None = None,
    on_round: Callable[[int], None] = lambda done: None,
) -> Times:
    """Time everyone in turns: `rounds` rounds at least, and on to `most` while it has taken less than `seconds`.

    Each was run before (`Contest.prepare`) and took about `first` seconds. What may be fast is run once more here, to
    learn how often a call must be repeated.
    """
    order, shuffle = list(runs), random.Random(seed)
    repeats = {}
    for name, run in runs.items():
        known = 0.0 if first is None else first[name]
        once = known if known > LONG else clock.seconds(run, 1)
        repeats[name] = min(MOST_REPEATS, max(1, math.ceil(SHORTEST / max(once, 1e-6))))
    found: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        for done in range(most):
            if done >= rounds and time.perf_counter() - wall > seconds:
                break
            shuffle.shuffle(order)
            for name in order:
                found[name].append(clock.seconds(runs[name], repeats[name]))
            on_round(done + 1)
        share = (time.process_time() - cpu) / max(time.perf_counter() - wall, 1e-9)
    finally:
        if collecting:
            gc.enable()
    return Times(found, share)


def summarise(own: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """The figures of one competitor: median and quartiles of the ratio within rounds, and the ratio of the minima."""
    ratios = [a / b for a, b in zip(own, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    return {
        "median_ratio": round(middle, 4),
        "low_ratio": round(low, 4),
        "high_ratio": round(high, 4),
        "min_ratio": round(min(own) / min(base), 4),
        "median_seconds": statistics.median(own),
        "min_seconds": min(own),
    }
