"""T5's relative positions: the learned table behind `clearhead.attention.t5`, one for all layers of a stack."""

from __future__ import annotations

import torch
import torch.nn as nn

from clearhead.attention.t5 import T5Bias
from clearhead.layers.position.score import ScorePosition


class RelativePosition(ScorePosition):
    """table[head, bucket], added to the scores of every layer.

    It starts at 0, so that a model begins as one without positions; its gradient lives from the first step on. Differs
    from T5, which draws small random numbers and (unlike us) leaves scores unscaled.
    """

    def __init__(self, heads: int, buckets: int, max_distance: int, *, bidirectional: bool) -> None:
        super().__init__()
        self.max_distance = max_distance
        self.bidirectional = bidirectional
        self.table = nn.Parameter(torch.zeros(heads, buckets))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"table": 0.0}

    def forward(self) -> T5Bias:
        """The bias of one forward pass."""
        return T5Bias(self.table, self.max_distance, self.bidirectional)
