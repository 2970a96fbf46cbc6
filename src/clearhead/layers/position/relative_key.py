"""Learned key positions by distance: a vector added to every key, as far back as a query sees.

Shapes: key [b, g, n, d], the newest key last; table [window, d].
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.init.standard import Draw, normal


class RelativeKey(nn.Module):
    """q . (k + P_i) = q . k + q . P_i for the key i tokens back, i = 1 .. window (the Feedback Transformer's position
    term, arXiv 2002.09402; one table for all heads and layers).

    The term is added to the key and not to the score, which is the same number and leaves fused kernels in play; keys
    are shared by layers, so it is added once per token. Row window - i of the table belongs to distance i. It starts
    from N(0, 1), as published: from 0 every memory begins alike, and a counter of one layer (experiments/feedback) was
    at chance after 220 steps.
    """

    def __init__(self, window: int, head_dim: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(window, head_dim))

    def start_values(self) -> dict[str, Draw]:
        """Start of each parameter."""
        return {"table": normal(1.0)}

    def forward(self, key_bgnd: Tensor) -> Tensor:
        """See the class."""
        window, n = self.table.shape[0], key_bgnd.shape[2]
        return key_bgnd + self.table[window - n :].to(key_bgnd.dtype)
