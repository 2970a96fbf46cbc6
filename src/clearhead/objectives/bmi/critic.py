"""The critic T(x, y): a number for a pair of segment vectors, high where y is likely to follow x.

    T(a, b) = (f([a, b, a - b, a * b, |a - b|]) + g([b, a, b - a, a * b, |a - b|])) / 2
    f, g    = dropout, linear, ReLU, dropout, linear to one number; each with its own weights

as in the released code of BMI (arXiv 1905.11978): the order of the pair is kept, since f and g differ.
Legend: b pairs, f size of a vector.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

ADAM_BETAS = (0.9, 0.999)


class Critic(nn.Module):
    """See the module's text. Weights are drawn Xavier-normal from `seed` alone, biases are 0."""

    def __init__(self, size: int, *, hidden: int = 100, dropout: float = 0.1, seed: int = 0) -> None:
        super().__init__()
        self.size = size
        self.forth = _net(5 * size, hidden, dropout)
        self.back = _net(5 * size, hidden, dropout)
        generator = torch.Generator().manual_seed(seed)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight, generator=generator)
                nn.init.zeros_(module.bias)

    def forward(self, a_bf: Tensor, b_bf: Tensor) -> Tensor:
        """Return T(a, b), [b], in fp32 or better. The leading shapes of a and b are broadcast."""
        if a_bf.shape[-1] != self.size or b_bf.shape[-1] != self.size:
            raise ValueError(
                f"critic: expected vectors of size {self.size}, got {tuple(a_bf.shape)} and {tuple(b_bf.shape)}; "
                f"the pooled layers and the model must be those it was made for"
            )
        a_bf, b_bf = torch.broadcast_tensors(a_bf, b_bf)
        product, distance = a_bf * b_bf, (a_bf - b_bf).abs()
        forth = self.forth(torch.cat([a_bf, b_bf, a_bf - b_bf, product, distance], dim=-1))
        back = self.back(torch.cat([b_bf, a_bf, b_bf - a_bf, product, distance], dim=-1))
        score = ((forth + back) / 2).squeeze(-1)
        return score.to(torch.promote_types(score.dtype, torch.float32))

    def parameter_groups(self, *, lr_scale: float, weight_decay: float) -> list[dict[str, Any]]:
        """One group for an optimizer: Adam's own betas, the given decay, and its gradient clipped apart."""
        return [
            {
                "name": "critic",
                "params": list(self.parameters()),
                "lr_scale": lr_scale,
                "weight_decay": weight_decay,
                "betas": ADAM_BETAS,
                "clipped": "critic",
            }
        ]


def _net(inputs: int, hidden: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Dropout(dropout), nn.Linear(inputs, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, 1)
    )
