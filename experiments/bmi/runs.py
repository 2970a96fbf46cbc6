"""One run of the package's own trainer, and what is measured of it on held-out documents.

Every arm reads the same text for its language model, in the same order, with the same first weights; the arms with BMI
read pairs of segments on top. "plain, equal operations" gets as many steps more as these pairs cost.
"""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clearhead.data.config import DataConfig
from clearhead.data.text import TextData, prepare
from clearhead.models.config import ModelConfig
from clearhead.models.io import load_model
from clearhead.models.make import build_model
from clearhead.objectives.bmi.information import estimate_information, freeze
from clearhead.objectives.bmi.raml import conditional_nats
from clearhead.objectives.bmi.segments import Segments
from clearhead.objectives.config import ObjectiveConfig
from clearhead.train.checkpoint import newest_model
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.loop import train
from clearhead.train.score_segments import cut_split
from clearhead.train.tasks.segments import extra_cost_of
from experiments.bmi.topics import Corpus, write_corpus

PLAIN, LONGER = "plain", "plain, equal operations"
BASE, FULL = "BMI-base, then BMI-base", "BMI-base, then BMI-full"
ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "BMI-base 0.1": {"nsp": 0.1},
    "BMI-base 1": {"nsp": 1.0},
    LONGER: {},
    BASE: {"nsp": 0.1},
    FULL: {"nsp": 0.1, "raml": 0.1},
}
TWO_PHASES = (BASE, FULL)
"""Half of the steps as BMI-base, and the other half from there on, with a schedule of its own; these two are compared
with each other alone."""


@dataclass(frozen=True)
class Setting:
    """What all arms of a corpus share."""

    source: str
    """A data set, or "topics", "shuffled"."""
    steps: int
    segment: int
    layers: int = 2
    width: int = 32
    heads: int = 2
    context: int = 96
    batch: int = 8
    lr: float = 5e-3
    pairs: int = 12
    critic_lr: float = 1e-3
    first_tokens: int = 4
    test_tokens: int = 20_000
    most_pairs: int = 2048
    init: str = "standard"
    corpus: Corpus = Corpus()


SETTINGS = {
    "topics": Setting("topics", steps=300, segment=12),
    "shuffled": Setting("shuffled", steps=300, segment=12),
    "shakespeare": Setting(
        "shakespeare", steps=600, segment=64, width=64, context=128, batch=4, lr=2.5e-3, pairs=6, first_tokens=8,
        test_tokens=32_768, most_pairs=1024, init="small",
    ),
}  # fmt: skip
"""The last one is the comparison's quick preset (`clearhead compare --preset quick`) for the language model."""
SMALL_CORPUS = Corpus(documents=120)
QUICK = Setting("topics", steps=12, segment=12, test_tokens=500, corpus=SMALL_CORPUS)


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    seed: int
    setting: Setting

    @property
    def key(self) -> tuple[str, str, int]:
        """What tells it from all others."""
        return (self.setting.source, self.arm, self.seed)


@contextmanager
def data_of(job: Job) -> Iterator[str]:
    """The source of a job's text. A made corpus lives in a folder of its own as long as the run."""
    setting = job.setting
    if setting.source not in ("topics", "shuffled"):
        yield setting.source
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{setting.source}.jsonl"
        write_corpus(path, setting.corpus, job.seed, shuffled=setting.source == "shuffled")
        before = os.environ.get("CLEARHEAD_DATA")
        os.environ["CLEARHEAD_DATA"] = str(Path(folder) / "prepared")
        try:
            yield str(path)
        finally:
            if before is None:
                del os.environ["CLEARHEAD_DATA"]
            else:
                os.environ["CLEARHEAD_DATA"] = before


def config_of(job: Job, source: str, **objective: Any) -> RunConfig:
    """The run of an arm, all of its steps."""
    setting = job.setting
    return RunConfig(
        model=ModelConfig(
            vocab_size=257,
            layers=setting.layers,
            width=setting.width,
            heads=setting.heads,
            context=setting.context,
            init=setting.init,
        ),
        data=DataConfig(source=source, context=setting.context),
        optim=OptimConfig(lr=setting.lr, warmup_steps=setting.steps // 20),
        objective=ObjectiveConfig(
            segments=f"chunk:{setting.segment}",
            pairs=setting.pairs,
            critic_lr=setting.critic_lr,
            **objective,
        ),
        train=TrainConfig(
            steps=setting.steps,
            batch_size=setting.batch,
            seed=job.seed,
            eval_every=max(1, setting.steps // 8),
            eval_tokens=4_096,
            test_tokens=setting.test_tokens,
            checkpoint_every=0,
            threads=1,
            device="cpu",
        ),
    )


def with_steps(config: RunConfig, steps: int) -> RunConfig:
    """The same with another number of steps, its warm-up and its evaluations in proportion."""
    return dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, warmup_steps=steps // 20),
        train=dataclasses.replace(config.train, steps=steps, eval_every=max(1, steps // 8)),
    )


def dearer(setting: Setting, source: str, objective: Mapping[str, Any]) -> float:
    """Operations of a step with this objective over those of a plain one."""
    config = config_of(Job("", 0, setting), source, **objective)
    model = build_model(config.model)
    own = model.flops_per_token(setting.context) * config.tokens_per_step
    return 1.0 + extra_cost_of(model, config).flops / own


def train_one(job: Job) -> dict[str, Any]:
    """Train the arm and measure it."""
    torch.set_num_threads(1)
    began, began_cpu = time.perf_counter(), time.process_time()
    setting, objective = job.setting, ARMS[job.arm]
    with tempfile.TemporaryDirectory() as folder, data_of(job) as source:
        config = config_of(job, source, **({} if job.arm in TWO_PHASES else objective))
        if job.arm == LONGER:
            config = with_steps(config, round(setting.steps * dearer(setting, source, ARMS["BMI-base 0.1"])))
        if job.arm in TWO_PHASES:
            half = setting.steps // 2
            base = with_steps(config_of(job, source, nsp=objective["nsp"]), half)
            train(base, Path(folder) / "base", progress=False)
            config = with_steps(config_of(job, source, **objective, start=str(Path(folder) / "base")), half)
        result = train(config, Path(folder) / "run", progress=False)
        model = load_model(newest_model(Path(folder) / "run"), device="cpu")
        measured = measure(model, prepare(config.data), setting)
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()
    effective = [line["effective_pairs"] for line in map(json.loads, lines) if "effective_pairs" in line]
    found = result.summary
    return {
        "corpus": setting.source,
        "arm": job.arm,
        "seed": job.seed,
        "status": result.status,
        "steps": config.total_steps * (2 if job.arm in TWO_PHASES else 1),
        "tokens": found["tokens"] * (2 if job.arm in TWO_PHASES else 1),
        "extra_tokens_per_step": found.get("extra_tokens_per_step", 0),
        "curve": [[point["step"], point["bits_per_byte"]] for point in found["val_curve"]],
        "test_bits_per_byte": found["test_bits_per_byte"],
        "own_critic_accuracy": found.get("test_nsp_accuracy"),
        "effective_pairs": effective and [min(effective), sum(effective) / len(effective)],
        "grad_norm": found["grad_norm"],
        **measured,
        "fingerprint": found["data_fingerprint"],
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - began_cpu, 1),
    }


def measure(model: torch.nn.Module, data: TextData, setting: Setting) -> dict[str, Any]:
    """On the test documents: what a fresh critic finds in the states, and the first tokens of next segments."""
    layers = tuple(range(1, setting.layers + 1))
    segments = cut_split(data, "test", f"chunk:{setting.segment}", data.tokenizer)
    pairs = freeze(model, segments, layers=layers, most=setting.most_pairs)
    found = estimate_information(pairs, choices=16, hidden=32)
    return {"information": found.to_dict(), "first_nats": first_nats(model, segments, setting)}


@torch.no_grad()
def first_nats(model: torch.nn.Module, segments: Segments, setting: Setting) -> float:
    """Nats per token of the first tokens of a next segment, given the segment before it and nothing else."""
    whole = segments.leading[segments.length[segments.leading + 1] >= setting.first_tokens]
    if len(whole) > setting.most_pairs:
        whole = whole[np.linspace(0, len(whole) - 1, setting.most_pairs).round().astype(np.int64)]
    nats, count = 0.0, 0
    for begin in range(0, len(whole), 64):
        rows = whole[begin : begin + 64]
        first, following = segments.read(rows), segments.read(rows + 1)
        lengths = torch.full((len(rows),), setting.first_tokens)
        found, counts = conditional_nats(
            model,
            torch.from_numpy(first.tokens),
            torch.from_numpy(first.lengths),
            torch.from_numpy(following.tokens[:, : setting.first_tokens]),
            lengths,
        )
        nats, count = nats + float(found.sum()), count + int(counts.sum())
    return nats / count
