"""One learned vector per position, added to the embedding.

Shapes: positions [1|b, t] int64 -> [1|b, t, width].
"""

from __future__ import annotations

import torch.nn as nn
from torch import Tensor


class LearnedPosition(nn.Module):
    """table[p] for p < context. A longer input has no row to read, so the decoder refuses it by its shape."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.table = nn.Embedding(context, width)

    def forward(self, positions: Tensor) -> Tensor:
        """See the class."""
        return self.table(positions)
