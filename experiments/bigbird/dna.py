"""Masked DNA with a context of 512, 1,024 and 4,096 bases: the E. coli genome through the package's own trainer.

Every context reads equally many bases a step, and all models have the same weights to learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clearhead.data.config import DataConfig
from clearhead.models.config import ModelConfig
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from experiments.bigbird.masked import scores

CONTEXTS = (512, 1024, 4096)
BASES_A_STEP = 4096
VOCABULARY = 16
TEST_BASES = 65_536


@dataclass(frozen=True)
class Job:
    """One run."""

    context: int
    seed: int
    steps: int


def config_of(job: Job, test_bases: int = TEST_BASES) -> RunConfig:
    """A small encoder with BigBird's blocks of 64; at 512 bases they see everything."""
    return RunConfig(
        model=ModelConfig(
            architecture="encoder",
            vocab_size=VOCABULARY,
            context=job.context,
            layers=2,
            width=64,
            heads=2,
            attention="bigbird",
        ),
        data=DataConfig(source="ecoli", tokenizer="dna", context=job.context),
        optim=OptimConfig(lr=3e-3, warmup_steps=max(1, job.steps // 10)),
        train=TrainConfig(
            steps=job.steps,
            batch_size=BASES_A_STEP // job.context,
            seed=job.seed,
            eval_every=0,
            test_tokens=test_bases,
            checkpoint_every=0,
            threads=1,
        ),
    )


def train_one(job: Job) -> dict[str, Any]:
    """Train; bits per hidden base and accuracy on stretches that training never saw."""
    own = {"context": job.context, "seed": job.seed, "steps": job.steps}
    return own | scores(config_of(job, TEST_BASES if job.steps > 20 else 8192))
