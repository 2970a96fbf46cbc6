"""AdamW over a model's own parameter groups."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch.optim import AdamW

from clearhead.train.config import OptimConfig

FUSED_DEVICES = ("cpu", "cuda", "xpu", "mps")
MODEL = "model"
"""Groups that say nothing else are clipped together under this name."""


def build_optimizer(groups: Iterable[Mapping[str, Any]], optim: OptimConfig) -> AdamW:
    """Return `torch.optim.AdamW` (Loshchilov and Hutter, arXiv 1711.05101) for `model.parameter_groups()`.

    A group's `weight_decay_scale` and `lr_scale` multiply the config's values: embeddings, norms, biases and
    temperatures come with a decay of 0, temperatures with their own learning rate. A group of something that trains
    beside the model may say its own `weight_decay` and `betas`, and by `clipped` with whom its gradient is clipped.

    Raises `ValueError` when there is no parameter, or one stands in two groups (torch checks the latter).
    """
    made = [
        {
            "name": group["name"],
            "params": list(group["params"]),
            "lr": optim.lr * group["lr_scale"],
            "lr_scale": group["lr_scale"],
            "weight_decay": (
                group["weight_decay"] if "weight_decay" in group else optim.weight_decay * group["weight_decay_scale"]
            ),
            "betas": group.get("betas", optim.betas),
            "clipped": group.get("clipped", MODEL),
        }
        for group in groups
    ]
    parameters: list[torch.Tensor] = [parameter for group in made for parameter in group["params"]]
    if not parameters:
        raise ValueError("build_optimizer: expected at least one parameter, got none; check model.parameter_groups()")
    # One kernel instead of a dozen small operations per parameter; the sums are the same.
    fused = all(p.device.type in FUSED_DEVICES and p.is_floating_point() for p in parameters)
    return AdamW(made, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=fused)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to `lr` times its own scale."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
