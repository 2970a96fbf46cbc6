"""FIRE's positions: the learned function behind `clearhead.attention.fire`, one for all layers of a stack."""

from __future__ import annotations

import math

import torch
import torch.nn as nn

from clearhead.attention.fire import FireBias
from clearhead.init.standard import Draw
from clearhead.layers.position.score import ScorePosition, wide

RATE = 0.1  # c at the start


class FirePosition(ScorePosition):
    """f(psi(|q - k|) / psi(max(L, i))), psi(d) = log(c d + 1), f a layer of `hidden` ReLUs and a linear map to heads.

    c = exp(.) and L = exp(.), so both stay above 0. c starts at 0.1, L at `threshold`. f starts as PyTorch's linear
    maps do: weights and levels of the hidden layer from U(-1, 1), those of the last from U(+-1/sqrt(hidden)); its base
    starts at 0.
    """

    def __init__(self, heads: int, hidden: int, threshold: float) -> None:
        super().__init__()
        if hidden < 1 or not threshold > 0.0:
            raise ValueError(f"FirePosition: expected hidden units and a threshold above 0, got {hidden}, {threshold}")
        self.hidden, self.threshold = hidden, threshold
        last = 1.0 / math.sqrt(hidden)
        self.hidden_weight = nn.Parameter(torch.empty(hidden).uniform_(-1.0, 1.0))
        self.hidden_level = nn.Parameter(torch.empty(hidden).uniform_(-1.0, 1.0))
        self.out_weight = nn.Parameter(torch.empty(heads, hidden).uniform_(-last, last))
        self.base = nn.Parameter(torch.zeros(heads))
        self.log_rate = nn.Parameter(torch.full((1,), math.log(RATE)))
        self.log_threshold = nn.Parameter(torch.full((1,), math.log(threshold)))

    def start_values(self) -> dict[str, Draw | float]:
        """Start of each parameter."""
        return {
            "hidden_weight": Draw("uniform", 1.0),
            "hidden_level": Draw("uniform", 1.0),
            "out_weight": Draw("uniform", 1.0 / math.sqrt(self.hidden)),
            "base": 0.0,
            "log_rate": math.log(RATE),
            "log_threshold": math.log(self.threshold),
        }

    def forward(self) -> FireBias:
        """The bias of one forward pass."""
        return FireBias(
            wide(self.hidden_weight),
            wide(self.hidden_level),
            wide(self.out_weight),
            wide(self.base),
            wide(self.log_rate).exp(),
            wide(self.log_threshold).exp(),
        )
