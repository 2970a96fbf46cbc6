"""Furthest: each of 64 tokens is a point on a circle and must name the point furthest from it among the 64.

The task behind the paper's lower bound (proposition 1): one layer of full attention sees every pair and can do it; a
sparse pattern of few layers is not expected to. Trained through the package's own trainer on `synthetic:furthest`.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.data.config import DataConfig
from clearhead.models.config import ModelConfig
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.loop import train

TOKENS, POINTS, BLOCK = 64, 64, 4
LAYERS = {"full": (1,), "window + global + random": (1, 2, 4), "window": (1, 2, 4)}
PATTERNS = {
    "full": ("softmax", TOKENS),
    "window + global + random": (
        f"bigbird:block_size={BLOCK},global_blocks=2,window_blocks=1,random_blocks=1",
        4 * BLOCK,
    ),
    "window": (f"bigbird:block_size={BLOCK},global_blocks=0,window_blocks=3,random_blocks=0", 3 * BLOCK),
}
"""The attention, and the keys that a token sees."""


@dataclass(frozen=True)
class Job:
    """One run."""

    pattern: str
    layers: int
    seed: int
    steps: int


def config_of(job: Job) -> RunConfig:
    """A small encoder without positions: the task is the same for every order of the tokens."""
    return RunConfig(
        model=ModelConfig(
            architecture="encoder",
            vocab_size=POINTS + 2,
            context=TOKENS,
            layers=job.layers,
            width=64,
            heads=1,
            attention=PATTERNS[job.pattern][0],
            position="none",
        ),
        data=DataConfig(source=f"synthetic:furthest,points={POINTS}", context=TOKENS),
        optim=OptimConfig(lr=3e-3, warmup_steps=max(1, job.steps // 10)),
        train=TrainConfig(
            steps=job.steps,
            batch_size=16,
            seed=job.seed,
            eval_every=0,
            test_tokens=32_768,
            checkpoint_every=0,
            threads=1,
        ),
    )


def train_one(job: Job) -> dict[str, Any]:
    """Train; bits and accuracy of the answers on sequences that training never saw."""
    with tempfile.TemporaryDirectory() as folder:
        found = train(config_of(job), Path(folder) / "run", progress=False).summary
    return {
        "pattern": job.pattern,
        "layers": job.layers,
        "seed": job.seed,
        "steps": job.steps,
        "accuracy": found["test_accuracy"],
        "bits": found["test_bits_per_answer"],
        "cpu_seconds": found["cpu_seconds"],
    }
