"""Gates on the attention output: the control that tells a better attention from a mere rescaling of its output.

Legend: b batch, h query heads, n tokens, d head dim, w width. Every gate starts as the exact identity.
"""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor


class FixedGate(nn.Module):
    """out_h * g_h: one learned scalar per head, the same for all tokens, starting at 1."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(heads))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"scale": 1.0}

    def forward(self, out_bhnd: Tensor, x_bnw: Tensor) -> Tensor:
        """See the class."""
        return out_bhnd * self.scale.to(out_bhnd.dtype)[:, None, None]


class TokenGate(nn.Module):
    """out * 2 sigmoid(W x), W starting at 0; `per_head` values are 1 (per head) or head_dim (per component).

    Differs from gated attention (arXiv 2505.06708, headwise and elementwise gates after the attention) in the factor 2
    and the zero start, which make the first forward equal to the ungated model's.
    """

    def __init__(self, width: int, heads: int, per_head: int) -> None:
        super().__init__()
        self.heads = heads
        self.projection = nn.Linear(width, heads * per_head, bias=False)

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"projection.weight": 0.0}

    def forward(self, out_bhnd: Tensor, x_bnw: Tensor) -> Tensor:
        """See the class."""
        gate_bnhe = 2.0 * torch.sigmoid(self.projection(x_bnw)).unflatten(-1, (self.heads, -1))
        return out_bhnd * gate_bnhe.transpose(1, 2).to(out_bhnd.dtype)


def make_gate(kind: str, width: int, heads: int, head_dim: int) -> FixedGate | TokenGate | None:
    """Return the gate `kind`: "none" (None), "fixed", "head" or "element"."""
    if kind == "none":
        return None
    if kind == "fixed":
        return FixedGate(heads)
    if kind == "head":
        return TokenGate(width, heads, per_head=1)
    if kind == "element":
        return TokenGate(width, heads, per_head=head_dim)
    raise ValueError(f"output_gate: expected 'none', 'fixed', 'head' or 'element', got {kind!r}")
