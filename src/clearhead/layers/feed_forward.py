"""The position-wise feed-forward network.

Shapes: x_btw [batch, tokens, width]; hidden_btf [batch, tokens, hidden].
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu}


class FeedForward(nn.Module):
    """down(act(up(x))) with ReLU or GELU. No biases.

    Shapes: [b, t, width] -> [b, t, width].
    """

    branch_output = "down"  # the matrix that writes into the residual stream; initialisations scale it

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_btw: Tensor) -> Tensor:
        """See the class."""
        return self.down(self.activation(self.up(x_btw)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202, eq. 6). No biases.

    Shapes: [b, t, width] -> [b, t, width].
    """

    branch_output = "down"

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, hidden, bias=False)
        self.up = nn.Linear(width, hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_btw: Tensor) -> Tensor:
        """See the class."""
        hidden_btf = F.silu(self.gate(x_btw)) * self.up(x_btw)
        return self.down(hidden_btf)


def make_feed_forward(kind: str, width: int, hidden: int) -> FeedForward | SwiGLU:
    """Return the feed-forward `kind`: "swiglu", "gelu" or "relu"."""
    if kind == "swiglu":
        return SwiGLU(width, hidden)
    if kind in ACTIVATIONS:
        return FeedForward(width, hidden, kind)
    raise ValueError(f"feed_forward: expected 'swiglu', 'gelu' or 'relu', got {kind!r}")
