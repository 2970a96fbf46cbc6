"""One run: a small decoder with some kind of positions learns bytes at one context, and is scored at longer ones."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clearhead.data.config import DataConfig
from clearhead.data.text import prepare
from clearhead.models.config import ModelConfig
from clearhead.models.io import load_model
from clearhead.train.checkpoint import newest_model
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.evaluate_lengths import evaluate_lengths
from clearhead.train.loop import train as train_run

SOURCE = "shakespeare"
CONTEXT, LENGTHS, STRIDE = 128, (128, 256, 512, 1024), 64
LAYERS, WIDTH, HEADS, ROWS, STEPS = 3, 64, 4, 16, 400
ARMS: dict[str, dict[str, Any]] = {
    "rope": {"position": "rope"},
    "none": {"position": "none"},
    "alibi": {"position": "alibi"},
    "t5": {"position": "t5"},
    "kerple log": {"position": "kerple"},
    "kerple power": {"position": "kerple", "kerple_form": "power"},
    "fire": {"position": "fire"},
    "transformer-xl": {"position": "xl", "xl_width": 16},
}
BASELINE = "rope"
RATES = (1.5e-3, 4e-3, 1e-2)
TUNING_SEED = 1000
"""Only the learning rate is chosen on it, by the validation text at the training context."""
SCORED_TOKENS, QUICK_TOKENS = 8_000, 640


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    rate: float
    seed: int
    steps: int = STEPS
    lengths: tuple[int, ...] = LENGTHS
    """Contexts scored on the test text; none while the rate is chosen."""
    tokens: int = SCORED_TOKENS

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this run."""
        return (self.arm, self.rate, self.seed, self.steps, self.lengths, self.tokens)


def key_of_run(run: dict[str, Any]) -> tuple[Any, ...]:
    """See `Job.key`."""
    return (run["arm"], run["rate"], run["seed"], run["steps"], tuple(run["lengths"]), run["tokens_asked"])


def config(job: Job) -> RunConfig:
    """The run of a job."""
    return RunConfig(
        model=ModelConfig(layers=LAYERS, width=WIDTH, heads=HEADS, context=CONTEXT, **ARMS[job.arm]),
        data=DataConfig(source=SOURCE, context=CONTEXT),
        optim=OptimConfig(lr=job.rate, warmup_steps=min(50, job.steps // 4), weight_decay=0.1),
        train=TrainConfig(
            steps=job.steps,
            batch_size=ROWS,
            seed=job.seed,
            eval_every=0,
            eval_tokens=20_000 if job.steps == STEPS else 2_000,
            test_tokens=128,  # the test text is read by length below
            checkpoint_every=0,
            threads=1,
        ),
    )


def train(job: Job) -> dict[str, Any]:
    """Train one arm and score the same test tokens with each context."""
    torch.set_num_threads(1)
    run, began = config(job), time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        ended = train_run(run, path, progress=False)
        trained = time.process_time()
        scores = None
        if job.lengths and ended.status == "finished":
            scores = evaluate_lengths(
                load_model(newest_model(path)),
                prepare(run.data),
                "test",
                job.lengths,
                trained=CONTEXT,
                stride=STRIDE,
                max_tokens=job.tokens,
            )
    summary = ended.summary
    val = summary["val_bits_per_byte"]
    return {
        "arm": job.arm,
        "rate": job.rate,
        "seed": job.seed,
        "steps": job.steps,
        "lengths": list(job.lengths),
        "tokens_asked": job.tokens,
        "status": ended.status,
        "parameters": summary["parameters"]["total"],
        "val": val if val is not None and math.isfinite(val) else None,
        "test": None if scores is None else {str(x.context): x.bits_per_byte for x in scores.results},
        "scored": None if scores is None else {"tokens": scores.tokens, "documents": scores.documents},
        "train_seconds": round(trained - began, 1),
        "score_seconds": round(time.process_time() - trained, 1),
    }


def best_rates(runs: list[dict[str, Any]]) -> dict[str, float]:
    """For each arm the rate of the lowest validation bits per byte."""
    found: dict[str, float] = {}
    for arm in ARMS:
        own = [run for run in runs if run["arm"] == arm and run["val"] is not None]
        if own:
            found[arm] = min(own, key=lambda run: run["val"])["rate"]
    return found
