"""The training that the toys share: AdamW by the package's own groups, a cosine, clipping, and the end of a bad run."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.models.groups import parameter_groups
from clearhead.train.config import OptimConfig
from clearhead.train.optimizer import build_optimizer, set_learning_rate

TEMPERATURE_LR_SCALE = 10.0
"""The package's own: temperatures learn so much faster than the matrices, the control's scalar included."""
WARM_UP = 0.05
"""Share of the steps in which the rate rises."""


def fit(model: nn.Module, loss_of_step: Callable[[int], Tensor], *, rate: float, steps: int) -> bool:
    """Train in place; False when loss or gradient stopped being finite. Nothing decays."""
    optim = OptimConfig(lr=rate, weight_decay=0.0)
    groups = parameter_groups(model, temperature_lr_scale=TEMPERATURE_LR_SCALE)
    for group in groups:
        group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
    optimizer = build_optimizer([group for group in groups if group["params"]], optim)
    rising = max(1, round(WARM_UP * steps))
    for step in range(steps):
        fall = 0.55 + 0.45 * math.cos(math.pi * max(0, step - rising) / max(1, steps - rising))
        set_learning_rate(optimizer, rate * min((step + 1) / rising, fall))
        loss = loss_of_step(step)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (bool(torch.isfinite(loss)) and bool(torch.isfinite(norm))):
            return False
        optimizer.step()
    return True
