"""One optimizer step.

The gradient is that of  (sum of nats over all valid tokens) / (number of all valid tokens),  where "all" spans the
micro-batches and the processes: a mean of means would weigh tokens of emptier micro-batches more.
Legend: b batch, t tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.memory.feedback import FeedbackState
from clearhead.memory.transformer_xl import SegmentMemory
from clearhead.objectives.causal_lm import causal_lm_loss
from clearhead.train.optimizer import MODEL
from clearhead.train.world import World, whole


class Batch(Protocol):
    """What one forward pass reads, and what it should find: one kind for each task."""

    def loss(self, called: nn.Module) -> tuple[Tensor, Tensor]:
        """Run the model; return what to minimise and the plain nats (often the same), sums over the valid targets."""
        ...


@dataclass(frozen=True)
class MicroBatch:
    """Next-token prediction; all [b, t] int64."""

    tokens_bt: Tensor
    targets_bt: Tensor
    """The next tokens; -100 is ignored."""
    segments_bt: Tensor | None
    """Document numbers; None when no row holds a boundary, which lets attention take its plain causal path."""

    def loss(self, called: nn.Module) -> tuple[Tensor, Tensor]:
        """See `Batch`."""
        nats, _ = causal_lm_loss(called(self.tokens_bt, segments=self.segments_bt), self.targets_bt)
        return nats, nats


@dataclass(frozen=True)
class MemoryBatch:
    """Next-token prediction in the next segment of each row's stream; all [b, t] int64."""

    tokens_bt: Tensor
    targets_bt: Tensor
    """The next tokens; -100 is ignored."""
    segments_bt: Tensor
    """Document numbers, the same for a document that goes on from the segment before."""
    memory: SegmentMemory | FeedbackState
    """Of these rows; the forward pass reads and fills it."""

    def loss(self, called: nn.Module) -> tuple[Tensor, Tensor]:
        """See `Batch`."""
        carried = {"state" if isinstance(self.memory, FeedbackState) else "memory": self.memory}
        logits_btV = called(self.tokens_bt, segments=self.segments_bt, **carried)
        nats, _ = causal_lm_loss(logits_btV, self.targets_bt)
        return nats, nats


@dataclass(frozen=True)
class StepResult:
    """What one step did, read from the device once."""

    loss: float
    """Plain nats per valid token, before the update."""
    grad_norm: float
    """Total norm of the model's gradient before clipping."""
    skipped: bool
    """Loss or gradient was not finite, so weights and optimizer were left alone."""
    stop: bool
    """Some process wants to stop: every process sees the same answer."""


def train_step(
    called: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Sequence[Batch],
    *,
    valid_tokens: int,
    clip_norm: float | None,
    world: World,
    precision: str = "fp32",
    stop: bool = False,
) -> StepResult:
    """Accumulate gradients over `micro_batches`, and step unless something is not finite.

    Args:
        called: the model as `World.wrap` returned it.
        micro_batches: this process's share of the step.
        valid_tokens: targets that count, in all micro-batches of all processes.
        stop: this process wants to stop after the step.
    """
    nats = torch.zeros((), device=world.device)
    for index, batch in enumerate(micro_batches):
        with world.micro_batch(called, last=index == len(micro_batches) - 1):
            with autocast(precision, world.device):
                loss, plain = batch.loss(called)
            # DDP and FSDP average gradients over processes; times their number, that is the sum.
            (loss * (world.size / max(valid_tokens, 1))).backward()
        nats += plain.detach()

    clipped = _clipped_together(optimizer)
    norms = [nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]) for parameters in clipped]
    seen = world.sum(torch.stack([nats, nats.new_tensor(stop)]))
    found = torch.cat([seen, *(whole(norm).reshape(1).to(seen) for norm in norms)])
    total, stops, grad_norm, *others = found.tolist()  # the one wait for the device

    finite = all(map(math.isfinite, (total, grad_norm, *others)))
    if finite:
        if clip_norm is not None:
            for parameters, norm in zip(clipped, norms, strict=True):
                nn.utils.clip_grads_with_norm_(parameters, clip_norm, norm)
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(total / max(valid_tokens, 1), grad_norm, skipped=not finite, stop=stops > 0)


def _clipped_together(optimizer: torch.optim.Optimizer) -> list[list[Tensor]]:
    """Parameters with a gradient: the model's first, then those of what trains beside it, if anything does."""
    together: dict[str, list[Tensor]] = {MODEL: []}
    for group in optimizer.param_groups:
        parameters: list[Tensor] = [p for p in group["params"] if p.grad is not None]
        if parameters:
            together.setdefault(group.get("clipped", MODEL), []).extend(parameters)
    return list(together.values())


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which the forward pass runs: plain for fp32, torch's autocast for bf16."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else nullcontext()
