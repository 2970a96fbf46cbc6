"""What BMI costs beside the task: tokens read and floating point operations of a step.

The run's budget in tokens counts the task's alone, so that arms with and without BMI read the same text for it; what is
read on top is said here, and enters the operations per token that a comparison shows and can hold equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from clearhead.objectives.bmi.critic import Critic
from clearhead.objectives.config import ObjectiveConfig


@dataclass(frozen=True)
class ExtraCost:
    """Of one step."""

    tokens: int
    """Positions read by the model for the segments, those without gradient included; at most (segments may be
    shorter)."""
    flops: float
    """Forward and backward, model and critic, for segments of full length."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"extra_tokens_per_step": self.tokens, "extra_flops_per_step": self.flops}


def extra_cost(model: Any, critic: Critic, objective: ObjectiveConfig) -> ExtraCost:
    """Count a step of `bmi_terms`.

        next-segment prediction   3 b n tokens without the output matrix; a third of the operations without gradient
        weights                   b n tokens, no gradient
        likelihood                b (2n - 1) tokens with the output matrix

    b pairs, n tokens of a segment. As in `clearhead.models.accounting`, a backward pass costs twice the forward.
    """
    if not objective.reads_segments:
        return ExtraCost(0, 0.0)
    b, n = objective.pairs, objective.segment_length
    head = getattr(model, "head", None)
    output = 0.0 if head is None else 6.0 * head.weight.numel()
    read = model.flops_per_token(n) - output
    weights = sum(p.numel() for name, p in critic.named_parameters() if name.endswith("weight"))
    trains_model = objective.nsp > 0.0 and objective.nsp_trains == "encoder+critic"
    tokens = 3 * b * n
    flops = tokens * read * (1.0 if trains_model else 1 / 3) + 2 * b * 2.0 * weights * (3 if objective.nsp else 1)
    if objective.raml > 0.0:
        pass_tokens = b * (2 * n - 1)
        tokens += b * n + pass_tokens
        flops += b * n * read / 3 + pass_tokens * model.flops_per_token(2 * n) + 2 * b * 2.0 * weights
    return ExtraCost(tokens, flops)
