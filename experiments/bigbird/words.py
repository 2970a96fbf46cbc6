"""The paper's ablation on text: a masked LM under random, window, both, both with globals, and full attention.

512 bytes of Shakespeare in 32 blocks of 16, through the package's own trainer. *random* sees its own block and random
ones; all but the full and the published pattern see five blocks of keys, so that what differs is where the keys stand.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clearhead.data.config import DataConfig
from clearhead.models.config import ModelConfig
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from experiments.bigbird.masked import scores

CONTEXT, BLOCK, ROWS = 512, 16, 8
VOCABULARY = 258  # bytes, the separator and the mask
TEST_TOKENS = 65_536


def _pattern(global_blocks: int, window_blocks: int, random_blocks: int) -> str:
    return (
        f"bigbird:block_size={BLOCK},global_blocks={global_blocks},window_blocks={window_blocks},"
        f"random_blocks={random_blocks}"
    )


PATTERNS = {
    "full": ("softmax", CONTEXT // BLOCK),
    "window + global + random, published": (_pattern(2, 3, 3), 8),
    "window + global + random": (_pattern(2, 1, 2), 5),
    "window + random": (_pattern(0, 3, 2), 5),
    "random": (_pattern(0, 1, 4), 5),
    "window": (_pattern(0, 5, 0), 5),
}
"""The attention, and the blocks of keys that a token sees."""


@dataclass(frozen=True)
class Job:
    """One run."""

    pattern: str
    seed: int
    steps: int


def config_of(job: Job) -> RunConfig:
    """A small encoder, the same but for its pattern."""
    return RunConfig(
        model=ModelConfig(
            architecture="encoder",
            vocab_size=VOCABULARY,
            context=CONTEXT,
            layers=2,
            width=64,
            heads=2,
            attention=PATTERNS[job.pattern][0],
        ),
        data=DataConfig(source="shakespeare", context=CONTEXT),
        optim=OptimConfig(lr=3e-3, warmup_steps=max(1, job.steps // 10)),
        train=TrainConfig(
            steps=job.steps,
            batch_size=ROWS,
            seed=job.seed,
            eval_every=0,
            test_tokens=TEST_TOKENS if job.steps > 20 else 8192,
            checkpoint_every=0,
            threads=1,
        ),
    )


def train_one(job: Job) -> dict[str, Any]:
    """Train; nats and accuracy of hidden bytes of plays that training never saw."""
    own = {"pattern": job.pattern, "seed": job.seed, "steps": job.steps}
    return own | scores(config_of(job))
