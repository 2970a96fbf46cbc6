"""One run on real text: the package's trainer and its score by document, with some layout of memory."""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clearhead.data.config import DataConfig
from clearhead.memory.layout import memory_bytes
from clearhead.models.config import ModelConfig
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.loop import train as train_run

SOURCE = "shakespeare"
LAYERS, WIDTH, SEGMENT, ROWS, STEPS = 6, 64, 32, 16, 1200
LONG, SHORT = 192, 24
ARMS = {
    "none": "full:0",
    "full": f"full:{LONG}",
    "last:1": f"last:1,long={LONG},short={SHORT}",
    "last:1, low layers short": f"last:1,long={LONG},short={SHORT},range=window",
}
"""Six layers: full has six long memories, last:1 one."""
BASELINE = "full"
TEST_TOKENS = 60_000


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    seed: int
    steps: int = STEPS

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this run."""
        return (self.arm, self.seed, self.steps)


def key_of_run(run: dict[str, Any]) -> tuple[Any, ...]:
    """See `Job.key`."""
    return (run["arm"], run["seed"], run["steps"])


def config(job: Job) -> RunConfig:
    """Bytes, every arm with lanes: the arm without a memory reads the same batches as the others."""
    return RunConfig(
        model=ModelConfig(
            layers=LAYERS,
            width=WIDTH,
            heads=2,
            context=SEGMENT,
            position="xl",
            xl_width=32,
            memory=ARMS[job.arm],
        ),
        data=DataConfig(source=SOURCE, context=SEGMENT),
        optim=OptimConfig(lr=2e-3, warmup_steps=min(50, job.steps // 4), weight_decay=0.1),
        train=TrainConfig(
            steps=job.steps,
            batch_size=ROWS,
            seed=job.seed,
            eval_every=0,
            eval_tokens=4096,
            test_tokens=TEST_TOKENS if job.steps == STEPS else 4096,
            checkpoint_every=0,
            threads=1,
        ),
    )


def train(job: Job) -> dict[str, Any]:
    """Train one arm and score it on the test documents."""
    torch.set_num_threads(1)
    run = config(job)
    layout = run.model.memory_layout
    assert layout is not None
    lengths = layout.lengths(LAYERS, SEGMENT)
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        ended = train_run(run, Path(folder) / "run", progress=False)
    summary = ended.summary
    return {
        "arm": job.arm,
        "seed": job.seed,
        "steps": job.steps,
        "memory": run.model.memory,
        "bytes_per_stream": memory_bytes(lengths, batch=1, width=WIDTH, element_size=4),
        "tokens": job.steps * ROWS * SEGMENT,
        "status": ended.status,
        "parameters": summary["parameters"]["total"],
        "val": summary["val_bits_per_byte"],
        "test": summary["test_bits_per_byte"],
        "step_ms": round(1000 * summary["step_seconds"]["median"], 1),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
