"""Kerple's positions: the learned kernels behind `clearhead.attention.kerple`, one set for all layers of a stack."""

from __future__ import annotations

import torch
import torch.nn as nn

from clearhead.attention.kerple import KerpleBias
from clearhead.init.standard import Draw
from clearhead.layers.position.score import ScorePosition, wide


class KerplePosition(ScorePosition):
    """-r1 log(1 + r2 |q - k|) or -r1 |q - k|^r2, r1 and r2 per head, shared by the layers of a stack as published.

    r1, r2 > 0 by construction, where the released code clamps them at 0.01 (and a power at 2) after each step:

        log     r1 = exp(a)        r2 = exp(b) / 2
        power   r1 = exp(a) / 2    r2 = 2 sigmoid(b)

    a and b start from U(-1, 1), so that heads begin apart: around the medians of the released code's U(0, 2) and
    U(0, 1), in a narrower range that leaves out kernels next to 0.
    """

    def __init__(self, heads: int, form: str) -> None:
        super().__init__()
        self.form = form
        self.log_scale = nn.Parameter(torch.empty(heads).uniform_(-1.0, 1.0))
        self.raw_rate = nn.Parameter(torch.empty(heads).uniform_(-1.0, 1.0))

    def start_values(self) -> dict[str, Draw]:
        """Start of each parameter."""
        return {"log_scale": Draw("uniform", 1.0), "raw_rate": Draw("uniform", 1.0)}

    def forward(self) -> KerpleBias:
        """The bias of one forward pass."""
        a, b = wide(self.log_scale), wide(self.raw_rate)
        if self.form == "log":
            return KerpleBias(a.exp(), 0.5 * b.exp(), "log")
        return KerpleBias(0.5 * a.exp(), 2.0 * b.sigmoid(), "power")
