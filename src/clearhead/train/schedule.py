"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from clearhead.errors import unknown
from clearhead.train.config import OptimConfig


def learning_rate(step: int, total_steps: int, optim: OptimConfig) -> float:
    """Return the learning rate of `step` (0 is the first), before a parameter group's own scale.

    With W = warmup_steps, T = total_steps, m = min_lr_fraction:

        step < W     lr (step + 1) / W
        cosine       lr (m + (1 - m) (1 + cos(pi t)) / 2),    t = (step - W) / (T - 1 - W)
        wsd          lr until the last D = ceil(decay_fraction T) steps, then linear down (MiniCPM, arXiv 2404.06395)
        constant     lr

    cosine and wsd stand at `lr * m` at the last step, T - 1. Raises `ValueError` for a step outside the run.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"learning_rate: expected a step in 0..{total_steps - 1}, got {step}")
    warmup, least = optim.warmup_steps, optim.min_lr_fraction
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    if optim.schedule == "cosine":
        t = (step - warmup) / max(total_steps - 1 - warmup, 1)
        return optim.lr * (least + (1 - least) * 0.5 * (1 + math.cos(math.pi * t)))
    if optim.schedule == "wsd":
        # The decay never reaches back into the warm-up.
        decay = min(math.ceil(optim.decay_fraction * total_steps), total_steps - warmup)
        done = max(0, step - (total_steps - decay) + 1) / decay
        return optim.lr * (1 - (1 - least) * done)
    raise unknown("schedule", optim.schedule, ("cosine", "wsd", "constant"))
