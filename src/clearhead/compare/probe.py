"""The speed probe: one whole training step of each arm in turn, in one process.

`python -m clearhead.compare.probe FOLDER` measures the plan of a folder.

Tokens per second of runs that share a machine say as much about the neighbours as about the arm. Here one thread takes
a step of every arm in every round, in a new order each round, and the ratio to the baseline is taken within the round:
what slows the machine for a while slows all arms of that round alike. The step is the training loop's own, with its
batch, clipping and optimizer.
"""

from __future__ import annotations

import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.compare.environment import usable_cores
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.pool import write_json

WARM_UP = 3
ROUNDS = 51
SECONDS = 10.0
"""Once it has taken this long, it ends with the rounds it has, if they are at least `LEAST_ROUNDS`."""
LEAST_ROUNDS = 9


def probe(plan: ComparePlan) -> dict[str, Any]:
    """Measure every arm of the plan and return what `probe.json` holds.

    For each arm: the median and the fastest step, in seconds; `ratio`, the median over rounds of its step's time
    divided by the baseline's in the same round, with the first and third quartile beside it.
    """
    import torch

    from clearhead.train.environment import load_average
    from clearhead.train.loop import Run
    from clearhead.train.world import World

    before, cores = load_average(), usable_cores()
    configs = {arm.name: arm.apply(plan.base) for arm in plan.arms}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    with World.join(plan.base.train) as world, tempfile.TemporaryDirectory() as scratch:
        runs: dict[str, Run] = {}
        for name, config in configs.items():
            # As many steps as the probe takes at most, whatever the plan says; the rate's schedule costs the same.
            train = dataclasses.replace(config.train, steps=10_000, tokens=None, seed=0)
            folder = Path(scratch) / str(len(runs))
            folder.mkdir()
            runs[name] = Run(dataclasses.replace(config, train=train), folder, world, None, False)
        order, shuffle, start = list(runs), random.Random(0), time.perf_counter()
        for turn in range(WARM_UP + ROUNDS):
            shuffle.shuffle(order)
            for name in order:
                began = time.perf_counter()
                runs[name].advance(False)  # reads the loss from the device, so nothing is left running behind it
                if turn >= WARM_UP:
                    seconds[name].append(time.perf_counter() - began)
            if turn + 1 >= WARM_UP + LEAST_ROUNDS and time.perf_counter() - start > SECONDS:
                break
        for run in runs.values():
            run.recorder.close()
    tokens = {name: config.tokens_per_step for name, config in configs.items()}
    return {
        "rounds": len(seconds[plan.baseline]),
        "warm_up": WARM_UP,
        "threads": torch.get_num_threads(),
        "device": str(world.device),
        "load_before": before,
        "load_after": load_average(),
        "busy": before is not None and before[0] > cores / 2,
        "arms": summarise(seconds, plan.baseline, tokens),
    }


def summarise(
    seconds: Mapping[str, Sequence[float]], baseline: str, tokens_per_step: Mapping[str, int]
) -> dict[str, Any]:
    """Return each arm's figures from its time in every round."""
    base = np.array(seconds[baseline])
    arms = {}
    for name, times in seconds.items():
        ratios = np.array(times) / base
        median = float(np.median(times))
        arms[name] = {
            "seconds": list(times),
            "median_seconds": median,
            "min_seconds": float(np.min(times)),
            "ratio": float(np.median(ratios)),
            "ratio_low": float(np.quantile(ratios, 0.25)),
            "ratio_high": float(np.quantile(ratios, 0.75)),
            "tokens_per_step": tokens_per_step[name],
            "tokens_per_second": tokens_per_step[name] / median,
        }
    return arms


if __name__ == "__main__":
    target = Layout(Path(sys.argv[1]))
    write_json(target.probe, probe(ComparePlan.load(target.folder)))
