"""What a model knows of neighbouring segments, on held-out documents: by its run's own critic, and by a fresh one.

Three quantities that say different things: the task's own score (likelihood), accuracy of next-segment prediction by
the critic that was trained beside the model (optimistic as a measure of information), and the information that a fresh
critic finds in the model's frozen states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.errors import UserError
from clearhead.objectives.bmi.critic import Critic
from clearhead.objectives.bmi.information import Information, estimate_information, freeze
from clearhead.objectives.bmi.nsp import nsp_accuracy, nsp_loss
from clearhead.objectives.bmi.segments import Segments, cut_documents
from clearhead.objectives.bmi.states import segment_vectors
from clearhead.objectives.bmi.terms import stacked

SCORED_PAIRS = 256
_SEED = 20_190_511  # every run of every seed is scored on the same pairs


@dataclass(frozen=True)
class SegmentResult:
    """What `clearhead evaluate` says of segments."""

    segments: str
    pooled: str
    information: Information
    nsp: float | None
    """Of the run's own critic, nats; None for a run without one."""
    nsp_accuracy: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "cut": self.segments,
            "pooled": self.pooled,
            "nsp": self.nsp,
            "nsp_accuracy": self.nsp_accuracy,
            "information": self.information.to_dict(),
        }


def score_segments(
    model: nn.Module,
    data: Any,
    split: str,
    *,
    tokenizer: Any,
    segments: str,
    pooled: str,
    layers: Sequence[int],
    critic: Critic | None,
) -> SegmentResult:
    """Cut the documents of `split` of `data` and score them.

    layers: of `pooled`. critic: the run's own, or None.
    Raises `UserError` when there are too few segments.
    """
    cut = cut_split(data, split, segments, tokenizer)
    loss = accuracy = None
    if critic is not None:
        loss, accuracy, _ = score_next_segment(model, critic, cut, layers=layers)
    return SegmentResult(segments, pooled, estimate_information(freeze(model, cut, layers=layers)), loss, accuracy)


def cut_split(data: Any, split: str, segments: str, tokenizer: Any) -> Segments:
    """Cut the documents of a split; their separators are left out. Raises `UserError` when nothing can be paired."""
    try:
        return cut_documents([document.tokens[1:] for document in data.documents(split)], segments, tokenizer=tokenizer)
    except UserError as problem:
        raise UserError(f"the {split} split: {problem}") from None


@torch.no_grad()
def score_next_segment(
    model: nn.Module, critic: Critic, segments: Segments, *, layers: Sequence[int], most: int = SCORED_PAIRS
) -> tuple[float, float, int]:
    """Return loss and accuracy of next-segment prediction, both without dropout, on `most` fixed pairs; and `most`."""
    device = next(model.parameters()).device
    modes = model.training, critic.training
    model.eval()
    critic.eval()
    scores: list[tuple[Tensor, Tensor]] = []
    try:
        for step in range(-(-most // 64)):
            pairs = segments.draw(min(64, most - 64 * step), lookahead=1.0, seed=_SEED, step=step)
            tokens, valid = stacked([pairs.first, pairs.next, pairs.other], device)
            first, following, other = segment_vectors(model, tokens, valid, layers=layers).chunk(3)
            scores.append((critic(first, following), critic(first, other)))
    finally:
        model.train(modes[0])
        critic.train(modes[1])
    joint, apart = (torch.cat(part) for part in zip(*scores, strict=True))
    return float(nsp_loss(joint, apart)), float(nsp_accuracy(joint, apart)), most
