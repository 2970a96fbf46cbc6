"""What BMI adds to a step: both terms of a batch of pairs, with their gradients routed.

    added = nsp * L_NSP + raml * L_RAML

| gradient of | reaches the model | reaches the critic |
|---|---|---|
| L_NSP | with nsp_trains=encoder+critic | yes |
| L_RAML | through p(later | x) alone | no |

The three segments of next-segment prediction are read in one pass, each on its own; `later` is read once more without
gradient for its weight, and once behind x for its likelihood. The weights are read from the critic without its dropout.
Legend: b pairs, t tokens, f size of a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from clearhead.objectives.bmi.critic import Critic
from clearhead.objectives.bmi.nsp import nsp_accuracy, nsp_loss
from clearhead.objectives.bmi.raml import conditional_nats, effective_sample_size, log_importance_weights
from clearhead.objectives.bmi.segments import Padded, Pairs
from clearhead.objectives.bmi.states import segment_vectors
from clearhead.objectives.config import ObjectiveConfig


@dataclass(frozen=True)
class Terms:
    """Scalars of one batch of pairs; the last two are None without a likelihood term."""

    added: Tensor
    """nsp * L_NSP + raml * L_RAML, with gradients."""
    nsp: Tensor
    """L_NSP, nats."""
    nsp_accuracy: Tensor
    raml: Tensor | None
    """L_RAML, nats per token."""
    effective: Tensor | None
    """1 / sum w^2, between 1 and the number of pairs."""

    def measured(self) -> dict[str, float]:
        """What a log says of them."""
        values = {"nsp": self.nsp, "nsp_accuracy": self.nsp_accuracy}
        if self.raml is not None and self.effective is not None:
            values |= {"raml": self.raml, "effective_pairs": self.effective}
        return {name: float(value.detach()) for name, value in values.items()}


def bmi_terms(
    model: nn.Module,
    critic: Critic,
    pairs: Pairs,
    objective: ObjectiveConfig,
    *,
    layers: Sequence[int],
    begin: int | None = None,
) -> Terms:
    """Return the terms of `pairs`.

    layers: which are pooled, from 1. begin: see `conditional_nats`.
    Raises `UserError` where the model has no likelihood and `objective.raml` asks for one.
    """
    device = next(model.parameters()).device
    learns = objective.nsp > 0.0
    with nullcontext() if learns and objective.nsp_trains == "encoder+critic" else torch.no_grad():
        tokens, valid = stacked([pairs.first, pairs.next, pairs.other], device)
        first_bf, next_bf, other_bf = segment_vectors(model, tokens, valid, layers=layers).chunk(3)
    with nullcontext() if learns else torch.no_grad():
        next_b, other_b = critic(first_bf, next_bf), critic(first_bf, other_bf)
        nsp = nsp_loss(next_b, other_b)
    accuracy = nsp_accuracy(next_b.detach(), other_b.detach())
    added = objective.nsp * nsp
    if objective.raml == 0.0:
        return Terms(added, nsp, accuracy, None, None)

    with torch.no_grad():
        tokens, valid = stacked([pairs.later], device)
        later_bf = segment_vectors(model, tokens, valid, layers=layers)
        score_b, baseline_b = _without_dropout(critic, first_bf, later_bf, next_bf)
        log_w_b = log_importance_weights(
            score_b,
            torch.from_numpy(pairs.log_q).to(device),
            temperature=objective.temperature,
            baseline_b=baseline_b,
        )
    nats_b, count_b = conditional_nats(
        model, *_lengths(pairs.first, device), *_lengths(pairs.later, device), begin=begin
    )
    raml = (log_w_b.exp().to(nats_b.dtype) * nats_b / count_b).sum()
    return Terms(added + objective.raml * raml, nsp, accuracy, raml, effective_sample_size(log_w_b))


def stacked(parts: Sequence[Padded], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Segments below each other, filled to one length: tokens and what is real (None when all is), [b, t]."""
    longest = max(part.tokens.shape[1] for part in parts)
    tokens = np.concatenate([np.pad(part.tokens, ((0, 0), (0, longest - part.tokens.shape[1]))) for part in parts])
    lengths = np.concatenate([part.lengths for part in parts])
    valid = None
    if (lengths < longest).any():
        valid = torch.from_numpy(Padded(tokens, lengths).valid).to(device)
    return torch.from_numpy(tokens).to(device), valid


def _lengths(part: Padded, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(part.tokens).to(device), torch.from_numpy(part.lengths).to(device)


def _without_dropout(critic: Critic, first_bf: Tensor, later_bf: Tensor, next_bf: Tensor) -> tuple[Tensor, Tensor]:
    was_training = critic.training
    critic.eval()
    try:
        return critic(first_bf, later_bf), critic(first_bf, next_bf)
    finally:
        critic.train(was_training)
