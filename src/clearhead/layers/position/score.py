"""What a position module that acts on scores has in common: one for all layers of a stack, it makes the call's bias."""

from __future__ import annotations

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.bias import Bias


class ScorePosition(nn.Module):
    """Base. Its parameters are never decayed; `forward` makes the bias of one forward pass."""

    def forward(self) -> Bias:
        """See the class."""
        raise NotImplementedError


def wide(t: Tensor) -> Tensor:
    """At least fp32: half precision would round distances."""
    return t.to(torch.promote_types(t.dtype, torch.float32))
