"""The residual stream: how a branch is normed, scaled and added.

A *rule* says how stream and branch are combined; DeepScaleLM and Admin are further rules. Shapes: x_btw [b, t, width].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor


class ScaledSum(nn.Module):
    """stream_scale * stream + branch_scale * branch; (1, 1) is the standard transformer.

    A rule with other constants, or with learned scales, is a module with the same call.
    """

    def __init__(self, stream_scale: float = 1.0, branch_scale: float = 1.0) -> None:
        super().__init__()
        self.stream_scale = stream_scale
        self.branch_scale = branch_scale

    def forward(self, stream_btw: Tensor, branch_btw: Tensor) -> Tensor:
        """See the class."""
        if self.stream_scale != 1.0:
            stream_btw = stream_btw * self.stream_scale
        return torch.add(stream_btw, branch_btw, alpha=self.branch_scale)

    def extra_repr(self) -> str:
        """See the class."""
        return f"stream_scale={self.stream_scale:g}, branch_scale={self.branch_scale:g}"


class PreNormResidual(nn.Module):
    """rule(x, dropout(f(norm(x))))."""

    def __init__(self, norm: nn.Module, rule: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.rule = rule
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_btw: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """See the class."""
        return self.rule(x_btw, self.dropout(branch(self.norm(x_btw))))


class PostNormResidual(nn.Module):
    """norm(rule(x, dropout(f(x))))."""

    def __init__(self, norm: nn.Module, rule: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = norm
        self.rule = rule
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_btw: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """See the class."""
        return self.norm(self.rule(x_btw, self.dropout(branch(x_btw))))


def make_residual(
    placement: str, norm: nn.Module, *, rule: nn.Module | None = None, dropout: float = 0.0
) -> PreNormResidual | PostNormResidual:
    """Return the residual for `placement` "pre" or "post"; `rule` defaults to the standard sum."""
    rule = ScaledSum() if rule is None else rule
    if placement == "pre":
        return PreNormResidual(norm, rule, dropout)
    if placement == "post":
        return PostNormResidual(norm, rule, dropout)
    raise ValueError(f"norm_placement: expected 'pre' or 'post', got {placement!r}")
