"""A trained softmax model under performer attention: what is lost at once, and how soon it comes back.

A decoder of 2 layers learns Shakespeare's bytes with softmax. Its weights then go three ways, with the same further
batches: softmax as before (the control), performer with its rows held, performer with rows drawn anew every few steps.
Legend: b batch, t tokens.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clearhead.data.config import DataConfig
from clearhead.data.text import TextData, prepare
from clearhead.layers.performer import PerformerFeatures
from clearhead.models.config import ModelConfig
from clearhead.models.convert import convert
from clearhead.models.decoder import Decoder
from clearhead.models.make import AnyModel, build_model
from clearhead.objectives.causal_lm import causal_lm_loss

CONTEXT, BATCH = 128, 16
FEATURES, REDRAW = 256, 10
BASE_RATE, FURTHER_RATE = 3e-3, 1e-3
HELD_OUT = 32
"""Windows of the validation text that are scored."""
ARMS = {
    "softmax, trained on": "softmax",
    "performer, rows held": f"performer:features={FEATURES},redraw=0",
    "performer, redrawn": f"performer:features={FEATURES},redraw={REDRAW}",
}


@dataclass(frozen=True)
class Job:
    """All of one seed: the softmax model and what becomes of it."""

    seed: int
    steps: int
    further: int
    every: int
    arms: tuple[str, ...] = tuple(ARMS)
    features: tuple[int, ...] = ()
    """Numbers of features whose loss at once is measured too."""


@lru_cache(maxsize=1)
def text() -> TextData:
    """The prepared bytes."""
    return prepare(DataConfig(source="shakespeare", tokenizer="bytes", context=CONTEXT))


def batch_at(seed: int, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets [b, t] of a step."""
    batch = text().batch("train", BATCH, CONTEXT, seed, step)
    return torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)


@lru_cache(maxsize=1)
def held_out() -> tuple[Tensor, Tensor]:
    """Windows of the validation text, spread over it, [HELD_OUT, t]."""
    stream = np.asarray(text().stream("val"), np.int64)
    starts = np.linspace(0, len(stream) - CONTEXT - 1, HELD_OUT).astype(int)
    windows = torch.from_numpy(np.stack([stream[i : i + CONTEXT + 1] for i in starts]))
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def score(model: AnyModel) -> dict[str, float]:
    """Nats per byte and share of next bytes named right, on the held-out windows."""
    was = model.training
    model.eval()
    tokens_bt, targets_bt = held_out()
    logits_btV = model(tokens_bt)
    nats, count = causal_lm_loss(logits_btV, targets_bt)
    right = (logits_btV.argmax(-1) == targets_bt).double().mean()
    model.train(was)
    return {"nats": float(nats / count), "accuracy": float(right)}


def train(model: AnyModel, job: Job, first: int, steps: int, *, rate: float, decay: bool) -> list[dict[str, float]]:
    """Adam over the batches first, first + 1, ...; return scores every `job.every` steps, the first before any."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0)
    looks = [{"step": 0.0, **score(model)}]
    model.train()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1.0 - step / steps if decay else 1.0)
        tokens_bt, targets_bt = batch_at(job.seed, first + step)
        nats, count = causal_lm_loss(model(tokens_bt), targets_bt)
        optimizer.zero_grad()
        (nats / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % job.every == 0 and (first or step + 1 == steps):
            looks.append({"step": step + 1.0, **score(model)})
    return looks


def other_draws(model: AnyModel, draws: int = 3) -> float | None:
    """Mean nats under rows that the model has not seen; None for a model without."""
    layers = [module for module in model.modules() if isinstance(module, PerformerFeatures)]
    if not layers:
        return None
    kept = [layer.projection.clone() for layer in layers]
    found = []
    for draw in range(draws):
        for place, layer in enumerate(layers):
            layer.start(1000 + 10 * draw + place)
        found.append(score(model)["nats"])
    for layer, rows in zip(layers, kept, strict=True):
        layer.projection.copy_(rows)
    return sum(found) / len(found)


def train_one(job: Job) -> dict[str, Any]:
    """The softmax model, and the arms from its weights."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    began = time.process_time()
    base = build_model(
        ModelConfig(vocab_size=257, context=CONTEXT, layers=2, width=64, heads=2, attention="softmax"), job.seed
    )
    assert isinstance(base, Decoder)
    looks = train(base, job, 0, job.steps, rate=BASE_RATE, decay=True)
    by_features = {m: score(convert(base, f"performer:features={m}"))["nats"] for m in job.features}
    arms = {}
    for name in job.arms:
        model = convert(base, ARMS[name])
        curve = train(model, job, job.steps, job.further, rate=FURTHER_RATE, decay=False)
        arms[name] = {"curve": curve, "other_draws": other_draws(model)}
    return {
        "seed": job.seed,
        "steps": job.steps,
        "further": job.further,
        "before": looks[0],
        "base": looks[-1],
        "arms": arms,
        "at_once_by_features": by_features,
        "cpu_seconds": round(time.process_time() - began, 1),
    }
