"""Short training runs on real text, with a look inside every few steps.

A decoder of 18 layers on Shakespeare's bytes, Adam (0.9, 0.98), constant learning rate, no warm-up, no clipping. The
first look is at initialisation; beside it stands what the theory says of the same weights. Legend: b batch, t tokens.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clearhead.data.config import DataConfig
from clearhead.data.text import TextData, prepare
from clearhead.errors import UserError
from clearhead.init.embedding_correlation import batch_repetition
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.objectives.causal_lm import causal_lm_loss
from clearhead.signal.describe import describe
from clearhead.signal.measurement import measure
from clearhead.signal.prediction import predict_skeleton
from clearhead.signal.verdicts import judge, verdict_of
from clearhead.signal.watch import TAPS, record_of
from experiments.rank_collapse.initial import strengthen

WINDOW = 20
"""A run's loss is the mean of its last so many steps."""
RATES = (1e-3, 5e-3)


@dataclass(frozen=True)
class Arm:
    """How the decoder starts, and what is meant to repair it."""

    init: str
    placement: str
    strength: float = 1.0
    qk_norm: bool = False
    dropout: float = 0.0


ARMS = {
    "Post-LN": Arm("xavier", "post"),
    "Post-LN, dropout 0.1": Arm("xavier", "post", dropout=0.1),
    "Post-LN, DeepScaleLM": Arm("deepscale", "post"),
    "Pre-LN": Arm("xavier", "pre"),
    "Pre-LN, strong scores": Arm("xavier", "pre", strength=4.0),
    "Pre-LN, strong scores, QK-norm": Arm("xavier", "pre", strength=4.0, qk_norm=True),
    "Pre-LN, DeepScaleLM": Arm("deepscale", "pre"),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    arm: str
    lr: float
    seed: int
    layers: int = 18
    width: int = 64
    tokens: int = 32
    batch: int = 16
    steps: int = 150
    every: int = 25


def config_of(job: Job) -> ModelConfig:
    """The decoder of a job; an untied output matrix, so that all arms start from small logits."""
    arm = ARMS[job.arm]
    return ModelConfig(
        vocab_size=257,
        context=job.tokens,
        layers=job.layers,
        width=job.width,
        heads=4,
        hidden=2 * job.width,
        feed_forward="relu",
        norm="layer",
        norm_placement=arm.placement,
        position="learned",
        tie_embeddings=False,
        qk_norm=arm.qk_norm,
        init=arm.init,
        dropout=arm.dropout,
    )


@lru_cache(maxsize=1)
def text(tokens: int) -> TextData:
    """The prepared bytes."""
    return prepare(DataConfig(source="shakespeare", tokenizer="bytes", context=tokens))


def entropies(tokens: int = 32) -> tuple[float, float]:
    """Nats of a byte of the training text, by its frequency alone and when the byte before it is known."""
    stream = np.asarray(text(tokens).stream("train"), np.int64)
    pairs = np.bincount(stream[:-1] * 257 + stream[1:], minlength=257 * 257).reshape(257, 257) / (len(stream) - 1)
    before = pairs.sum(1, keepdims=True)
    after = pairs.sum(0)
    known = np.where(pairs > 0, pairs * np.log(np.where(pairs > 0, pairs / np.maximum(before, 1e-300), 1.0)), 0.0)
    return float(-(after * np.log(np.where(after > 0, after, 1.0))).sum()), float(-known.sum())


def batch_at(job: Job, step: int) -> tuple[Tensor, Tensor]:
    """Tokens and targets [b, t] of a step."""
    batch = text(job.tokens).batch("train", job.batch, job.tokens, job.seed, step)
    return torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)


def train_one(job: Job) -> dict[str, Any]:
    """Train; return losses, the prediction at the start and the record of every look."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    arm = ARMS[job.arm]
    model = build_model(config_of(job), job.seed).train()
    strengthen(model, arm.strength)
    optimizer = torch.optim.Adam(model.parameters(), lr=job.lr, betas=(0.9, 0.98))
    tokens_bt, _ = batch_at(job, 0)
    skeleton = describe(model, tokens=job.tokens, repetition=batch_repetition(tokens_bt.numpy()))
    predicted = predict_skeleton(skeleton)
    findings = judge(predicted)
    stats = [tap.attention for tap in predicted.at("branch", "attention")]
    losses: list[float] = []
    looks: list[dict[str, Any]] = []
    began = time.perf_counter()
    for step in range(job.steps + 1):
        tokens_bt, targets_bt = batch_at(job, step)
        if step % job.every == 0:
            looks.append(_look(model, tokens_bt, targets_bt, step))
        if step == job.steps:
            break
        nats, count = causal_lm_loss(model(tokens_bt), targets_bt)
        loss = nats / count
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    last = losses[-WINDOW:]
    finite = all(map(math.isfinite, losses))
    return {
        "arm": job.arm,
        "lr": job.lr,
        "seed": job.seed,
        "loss": sum(last) / len(last) if finite else None,
        "losses": [round(loss, 4) for loss in losses[::5]] if finite else [],
        "predicted": {
            "verdict": verdict_of(findings),
            "findings": [f"{one.kind} ({one.severity})" for one in findings],
            "correlation": [
                round(tap.forward.correlation, 5)
                for tap in predicted.stream("decoder")
                if tap.forward is not None and tap.part in ("attention", "output")
            ],
            "score_variance": [float(f"{one.score_variance:.5g}") for one in stats if one],
            "entropy": [float(f"{one.entropy / one.uniform_entropy:.5g}") for one in stats if one],
        },
        "looks": looks,
        "seconds": round(time.perf_counter() - began, 1),
    }


def _look(model: torch.nn.Module, tokens_bt: Tensor, targets_bt: Tensor, step: int) -> dict[str, Any]:
    """Correlation of the stream, score variance and relative entropy by layer; empty for weights beyond measure."""
    try:
        trace = measure(
            model, {"tokens": tokens_bt, "targets": targets_bt}, rows=32, backward=False, taps=TAPS, seed=step
        )
    except UserError as problem:
        return {"step": step, "problem": str(problem)}
    stack = record_of(trace, step)["stacks"]["decoder"]
    kept = ("correlation", "score_variance", "entropy")
    return {"step": step} | {
        name: [None if value is None else float(f"{value:.5g}") for value in stack[name]] for name in kept
    }
