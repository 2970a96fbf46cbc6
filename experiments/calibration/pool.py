"""A pool of real short runs: arms that differ in something that means nothing, to draw A/A comparisons from.

Parameters that arms share start equal, the order of the text is the seed's, and a run is a function of its
configuration: two identical arms are equal to the last bit, so a comparison of them is no test of any statistics (that
they are equal is checked here too). What may differ and mean nothing:

- start: each arm draws its first weights from a stream of its own, and reads the text in the order of the seed. The
  arms of a seed then share luck, as arms of a real comparison do, and have luck of their own;
- rounding: the batch is cut into two pieces whose gradients are added. The same mathematics, other last bits. This is
  the smallest difference that an A/A of real runs can have, and Student's t does not care for its size.

One arm is really different: `lower rate`, with 0.7 times the learning rate and a stream of its own.
"""

from __future__ import annotations

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.compare.costs import run_config
from clearhead.compare.plan import ComparePlan
from clearhead.train.config import RunConfig

START = ("start 1", "start 2", "start 3", "start 4")
ROUNDING = ("whole batch", "two pieces")
WORSE, SHARE_OF_RATE = "lower rate", 0.7
AGAIN = "whole batch again"
"""The same arm under another name."""
SEEDS, STEPS = 48, 300
AGAIN_SEEDS = 3
PIECES = {"two pieces": 2}
STREAM = 10_000
"""Distance between the streams of first weights, above any seed."""


@dataclass(frozen=True)
class Job:
    """One run of the pool."""

    arm: str
    seed: int
    steps: int


def jobs(seeds: int, steps: int) -> list[Job]:
    """Seed by seed over all arms; the repeated arm for the first few seeds."""
    return [
        Job(arm, seed, steps)
        for seed in range(seeds)
        for arm in (*START, *ROUNDING, WORSE, *([AGAIN] if seed < AGAIN_SEEDS else []))
    ]


def base(steps: int) -> RunConfig:
    """A one-layer decoder on shakespeare."""
    changes = {
        "model.layers": 1,
        "model.width": 32,
        "model.heads": 2,
        "train.eval_every": 0,
        "train.eval_tokens": 4_096,
        "train.test_tokens": 16_384,
        "train.checkpoint_every": 0,
    }
    return ComparePlan.build(preset="quick", context=64, steps=steps, overrides=changes).base


def config_of(job: Job) -> RunConfig:
    """The configuration of a run; `begin_weights` says what stands beside it."""
    config = run_config(base(job.steps), steps=job.steps, seed=job.seed, rate=None)
    if job.arm in PIECES:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, grad_accum=PIECES[job.arm]))
    if job.arm == WORSE:
        config = dataclasses.replace(
            config, optim=dataclasses.replace(config.optim, lr=config.optim.lr * SHARE_OF_RATE)
        )
    return config


def stream_of(arm: str) -> int | None:
    """The arm's own stream of first weights; None = the seed's."""
    own = (*START, WORSE)
    return own.index(arm) + 1 if arm in own else None


def train_one(job: Job) -> dict[str, Any]:
    """Train by the loop that trains everything, from first weights of the arm's stream, and return what it ended at."""
    from clearhead.models.make import build_model
    from clearhead.train.loop import Run
    from clearhead.train.repeatable import settings_put_back
    from clearhead.train.world import World

    config, stream = config_of(job), stream_of(job.arm)
    with tempfile.TemporaryDirectory() as name, World.join(config.train) as world, settings_put_back():
        run = Run(config, Path(name), world, None, False)
        if stream is not None:
            run.model.load_state_dict(build_model(config.model, STREAM * stream + job.seed).state_dict())
        result = run.carry_out()
        run.recorder.close()
    summary = result.summary
    return {
        "arm": job.arm,
        "seed": job.seed,
        "steps": job.steps,
        "status": result.status,
        "test": summary["test_bits_per_byte"],
        "val": summary["val_bits_per_byte"],
        "cpu_seconds": summary["cpu_seconds"],
    }


def key_of_job(job: Job) -> tuple[str, int, int]:
    """What a run of the pool is known by."""
    return job.arm, job.seed, job.steps


def key_of_run(run: dict[str, Any]) -> tuple[str, int, int]:
    """As `key_of_job`."""
    return run["arm"], run["seed"], run["steps"]
