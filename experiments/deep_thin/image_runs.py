"""One training run of the vision transformer."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clearhead.train.optimizer import build_optimizer, set_learning_rate
from clearhead.train.schedule import learning_rate
from experiments.deep_thin.images import Split, load
from experiments.deep_thin.settings import Arm, Setting, outside_embedding
from experiments.deep_thin.vit import build, score

FIRST_LOOK = 512
"""Training images from which DeepScaleLM's r0 is read."""

_loaded: dict[str, dict[str, Split]] = {}


def train_images(setting: Setting, arm: Arm, rate: float, seed: int, *, judged: bool) -> dict[str, Any]:
    """Train an arm; `judged` = score the test split at the end."""
    if setting.source not in _loaded:
        _loaded[setting.source] = load(setting.source)
    data = _loaded[setting.source]
    began = time.perf_counter()
    torch.manual_seed(seed)  # dropout
    model = build(setting.config(arm), data["train"].patches[:FIRST_LOOK], seed)
    optim = setting.optim(rate)
    optimizer = build_optimizer(model.parameter_groups(), optim)
    seconds, losses, finite = [], [], True
    for step in range(setting.steps):
        rows = torch.from_numpy(rows_at(len(data["train"].classes), setting.batch, seed, step))
        patches, classes = data["train"].patches[rows], data["train"].classes[rows]
        start = time.perf_counter()
        set_learning_rate(optimizer, learning_rate(step, setting.steps, optim))
        loss = F.cross_entropy(model(patches), classes)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm or math.inf)
        optimizer.step()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - start)
        finite = math.isfinite(losses[-1])
        if not finite:
            break
    counts = model.count_parameters()
    row: dict[str, Any] = {
        "status": "finished" if finite else "diverged",
        "parameters": counts["total"],
        "outside_embedding": outside_embedding(counts),
        "r0": model.config.embedding_correlation,
        "train_nats": losses[-1] if finite else None,
        "step_ms": 1000 * float(np.median(seconds)),
    }
    if finite:
        val = data["val"]
        row["val"], row["val_nats"] = score(model, val.patches[: setting.validate], val.classes[: setting.validate])
        if judged:
            test = data["test"]
            row["test"], row["test_nats"] = score(model, test.patches[: setting.test], test.classes[: setting.test])
    return {**row, "seconds": round(time.perf_counter() - began, 1)}


def rows_at(images: int, batch: int, seed: int, step: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """The rows of a step, a pure function of (seed, step): each epoch is a new order, without its incomplete batch."""
    per_epoch = images // batch
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng((seed, epoch)).permutation(images)
    return order[place * batch : (place + 1) * batch]
