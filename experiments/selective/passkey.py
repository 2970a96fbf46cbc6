"""The passkey: a value somewhere in a filler, asked for at the end; trained at 64 tokens, asked at up to 2,048.

The package's own task, `synthetic:needle`, and its own decoder. A lone value by one layer of one head, without
positions and with rotary ones; and one of four values, each behind its key, by two layers with ALiBi. The sequences of
a seed are the same for every arm.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.data.config import DataConfig
from clearhead.data.synthetic.source import SyntheticData
from clearhead.data.synthetic.task import IGNORE
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from experiments.selective import spikiness
from experiments.selective.arms import ARMS, FIVE
from experiments.selective.fit import fit
from experiments.selective.tuned import Job, Plan, Run

TRAINED, LENGTHS = 64, (64, 256, 1024, 2048)
BATCH = 32
RATES = (2e-3, 4e-3, 8e-3)
VALIDATED, ASKED = 512, {64: 512, 256: 256, 1024: 128, 2048: 96}
"""Questions by which a learning rate is chosen, at the trained length; and at each length at the end."""
READ = 32
"""Sequences on which attention maps are looked at."""


@dataclass(frozen=True)
class Setting:
    """A task and the model for it."""

    words: str
    task: str
    steps: int
    shape: Mapping[str, Any]


LONE = "synthetic:needle,facts=1,asks=1,keys=0,values=8,words=16"
KEYED = "synthetic:needle,facts=4,asks=4,keys=8,values=8,words=16"
ONE_HEAD: Mapping[str, Any] = {"layers": 1, "width": 32, "heads": 1}
SETTINGS = {
    "none": Setting("lone value, no positions", LONE, 200, {**ONE_HEAD, "position": "none"}),
    "rope": Setting("lone value, rotary", LONE, 200, {**ONE_HEAD, "position": "rope"}),
    "keys": Setting(
        "keys, ALiBi", KEYED, 300, {"layers": 2, "width": 64, "heads": 4, "position": "alibi", "embedding_norm": True}
    ),
}


def plans(seeds: int, *, quick: bool = False) -> list[Plan]:
    """Five arms in every setting; one plan for each number of steps."""
    if quick:
        return [Plan(FIVE[:3], RATES[1:2], steps=8, seeds=2, settings=("none", "keys"))]
    return [
        Plan(FIVE, RATES, steps=steps, seeds=seeds, settings=[n for n, one in SETTINGS.items() if one.steps == steps])
        for steps in sorted({one.steps for one in SETTINGS.values()})
    ]


def data(setting: str) -> SyntheticData:
    """The task at the trained length."""
    return SyntheticData(DataConfig(source=SETTINGS[setting].task, context=TRAINED))


def config(arm: str, setting: str) -> ModelConfig:
    """The model of an arm."""
    return ModelConfig(
        vocab_size=data(setting).vocab_size,
        context=TRAINED,
        init="xavier",
        tie_embeddings=False,
        **SETTINGS[setting].shape,
        **ARMS[arm],
    )


def answers(model: torch.nn.Module, tokens_bt: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and targets where something is asked, [asked, vocabulary] and [asked]."""
    asked = targets_bt != IGNORE
    return model(tokens_bt)[asked], targets_bt[asked]


@torch.no_grad()
def score(model: torch.nn.Module, source: SyntheticData, split: str, length: int, questions: int) -> dict[str, float]:
    """Right answers and nats an answer on the first sequences of a split, enough for so many questions."""
    model.eval()
    right, nats, asked = 0, 0.0, 0
    rows, sequences = max(4, 8192 // length), questions // source.task.options()["asks"]
    for first in range(0, sequences, rows):
        batch = source.rows(split, range(first, min(first + rows, sequences)), length)
        said, wanted = answers(model, torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
        right += int((said.argmax(-1) == wanted).sum())
        nats += float(F.cross_entropy(said, wanted, reduction="sum"))
        asked += len(wanted)
    model.train()
    return {"accuracy": right / asked, "loss": nats / asked}


def train(job: Job) -> Run:
    """One run."""
    torch.set_num_threads(1)
    began = time.process_time()
    source = data(job.setting)
    model = build_model(config(job.arm, job.setting), seed=job.seed + 1)

    def loss_of_step(step: int) -> Tensor:
        batch = source.batch("train", BATCH, TRAINED, job.seed, step)
        return F.cross_entropy(*answers(model, torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)))

    if not fit(model, loss_of_step, rate=job.rate, steps=job.steps):
        return job.record("diverged", val=None)
    found: dict[str, Any] = {"val": score(model, source, "val", TRAINED, VALIDATED)["loss"]}
    if job.seed < 1000:
        few = job.steps < min(one.steps for one in SETTINGS.values())  # a quick run only shows that it runs
        asked = dict.fromkeys(LENGTHS, 4) if few else ASKED
        found["lengths"] = {str(n): score(model, source, "test", n, asked[n]) for n in LENGTHS}
        seen = torch.from_numpy(source.rows("test", range(READ), TRAINED).tokens)
        found["maps"] = spikiness.of_model(model, seen)
    total = sum(p.numel() for p in model.parameters())
    return job.record("finished", **found, parameters=total, cpu_seconds=round(time.process_time() - began, 2))
