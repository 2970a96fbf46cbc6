"""A small vision transformer of Hugging Face, trained from scratch on scikit-learn's digits under each attention."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.adopt_encoders.under import under

TEST = 597


@dataclass(frozen=True)
class Job:
    """One attention and one seed of weights and order."""

    attention: str
    seed: int
    epochs: int


@lru_cache(maxsize=1)
def images() -> tuple[Tensor, Tensor]:
    """1,797 images [n, 1, 8, 8] between -1 and 1 and their classes, in an order drawn once; the last are the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pixels = torch.from_numpy(found.images[order] / 8 - 1).float()
    return pixels[:, None], torch.from_numpy(found.target[order])


def train(job: Job) -> dict[str, Any]:
    """Train and test once."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    model = ViTForImageClassification(
        ViTConfig(
            image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4, num_attention_heads=4,
            intermediate_size=128, num_labels=10, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )
    )  # fmt: skip
    pixels, classes = images()
    known = len(classes) - TEST
    draw = torch.Generator().manual_seed(job.seed)
    with under(model, job.attention):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
        total = job.epochs * (known // 50)
        model.train()
        for step in range(total):
            if step % (known // 50) == 0:
                order = torch.randperm(known, generator=draw)
            place = order[step % (known // 50) * 50 :][:50]
            optimizer.param_groups[0]["lr"] = 1e-3 * min(1.0, (step + 1) / 20) * (1 - step / total)
            loss = model(pixel_values=pixels[place], labels=classes[place]).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()
        with torch.no_grad():
            logits = model(pixel_values=pixels[known:]).logits
    right = int((logits.argmax(-1) == classes[known:]).sum())
    nats = float(torch.nn.functional.cross_entropy(logits, classes[known:]))
    return {
        "seed": job.seed,
        "epochs": job.epochs,
        "right": right,
        "of": TEST,
        "nats": nats,
    }
