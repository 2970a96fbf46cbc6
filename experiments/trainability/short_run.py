"""One short real training run, and whether it learned."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.objectives.causal_lm import causal_lm_loss
from experiments.trainability.task import SuccessorTask

WINDOW = 20
"""The loss of a run is the mean of its last so many steps."""


@dataclass(frozen=True)
class ShortRun:
    """What came out of one run."""

    config: dict[str, Any]
    seed: int
    lr: float
    warmup_steps: int
    steps: int
    loss: float
    """Mean nats of the last `WINDOW` steps; inf when it diverged."""
    losses: tuple[float, ...]
    """Every tenth step."""
    marginal: float
    conditional: float
    seconds: float

    @property
    def learned(self) -> bool:
        """Whether a tenth of the way from the marginal to the conditional entropy was covered."""
        return self.loss < self.marginal - 0.1 * (self.marginal - self.conditional)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "learned": self.learned, "loss": self.loss if math.isfinite(self.loss) else "inf"}


def short_run(
    config: ModelConfig,
    task: SuccessorTask,
    *,
    seed: int = 0,
    lr: float = 3e-4,
    warmup_steps: int = 0,
    steps: int = 150,
    prepare: Any = None,
) -> ShortRun:
    """Train with Adam (0.9, 0.98) on `task`. `prepare(model, tokens_bt)` may profile or repair the model first."""
    torch.manual_seed(seed)
    model = build_model(config, seed).train()
    if prepare is not None:
        prepare(model, torch.from_numpy(task.batch_at(seed, 0)[0]))
    optimizer = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98))
    losses: list[float] = []
    began = time.perf_counter()
    for step in range(steps):
        tokens, targets = (torch.from_numpy(part) for part in task.batch_at(seed, step))
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / max(1, warmup_steps))
        nats, count = causal_lm_loss(model(tokens), targets)
        loss = nats / count
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            break
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    finite = math.isfinite(losses[-1])
    return ShortRun(
        config=config.to_dict(),
        seed=seed,
        lr=lr,
        warmup_steps=warmup_steps,
        steps=steps,
        loss=sum(losses[-WINDOW:]) / len(losses[-WINDOW:]) if finite else math.inf,
        losses=tuple(losses[::10]),
        marginal=task.marginal_entropy,
        conditional=task.conditional_entropy,
        seconds=time.perf_counter() - began,
    )
