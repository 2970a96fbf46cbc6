"""The residual stream: how a branch is normed, scaled and added.

A *rule* is a module called with (stream, branch after its dropout) that answers their sum:

    PlainSum          stream + branch                                     the standard transformer
    ScaledSum         lambda * stream + beta * branch                     DeepScaleLM: two constants, in buffers
    OmegaSum          omega * stream + branch                             omega a trained vector of size width
    ProfiledOmegaSum  the same, and remembers whether omega was profiled  Admin
    ConstantOmegaSum  omega * stream + branch                             omega a constant, in a buffer (admin-torch)

A rule reads no number on the host, so it compiles into one graph. Half precision streams are added in fp32 and rounded
once. Legend: b batch, t tokens, w width; x_btw [b, t, width].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.layers.scale import Constants, value_of, widened


class PlainSum(nn.Module):
    """stream + branch."""

    def forward(self, stream_btw: Tensor, branch_btw: Tensor) -> Tensor:
        """See the class."""
        return stream_btw + branch_btw


class ScaledSum(Constants):
    """stream_scale * stream + branch_scale * branch, with both constants in buffers of those names."""

    stream_scale: Tensor
    branch_scale: Tensor

    def __init__(self, stream_scale: float, branch_scale: float) -> None:
        super().__init__()
        self._constant("stream_scale", stream_scale)
        self._constant("branch_scale", branch_scale)

    def forward(self, stream_btw: Tensor, branch_btw: Tensor) -> Tensor:
        """See the class."""
        total_btw = widened(stream_btw) * self.stream_scale + widened(branch_btw) * self.branch_scale
        return total_btw.to(torch.promote_types(stream_btw.dtype, branch_btw.dtype))

    def extra_repr(self) -> str:
        """See the class."""
        return f"stream_scale={value_of(self.stream_scale)}, branch_scale={value_of(self.branch_scale)}"


class OmegaSum(nn.Module):
    """omega * stream + branch with a trained vector omega [width] that starts at `start` in every entry.

    Stands before a norm only (post placement). Its parameter has an optimizer group without weight decay: decay would
    pull omega to 0, toward a heavier dependency on the branch.
    """

    def __init__(self, width: int, start: float = 1.0) -> None:
        super().__init__()
        self.start = start
        self.omega = nn.Parameter(torch.full((width,), start))

    def start_values(self) -> dict[str, float]:
        """Start of each parameter."""
        return {"omega": self.start}

    def forward(self, stream_btw: Tensor, branch_btw: Tensor) -> Tensor:
        """See the class."""
        total_btw = widened(stream_btw) * widened(self.omega) + widened(branch_btw)
        return total_btw.to(torch.promote_types(stream_btw.dtype, branch_btw.dtype))


class ProfiledOmegaSum(OmegaSum):
    """`OmegaSum` whose omega a profile pass sets (clearhead.init.admin).

    The buffer `profiled` says whether that has happened. It is in the state dict, so a loaded model is never profiled
    again, and it is not read off the value: the first sub-layer of a profiled stack rightly keeps omega = 1.
    """

    profiled: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("profiled", torch.zeros((), dtype=torch.uint8))  # uint8: gloo broadcasts no bool


class ConstantOmegaSum(Constants):
    """omega * stream + branch with one constant omega in a buffer of shape [1]."""

    omega: Tensor

    def __init__(self, omega: float) -> None:
        super().__init__()
        self._constant("omega", omega, shape=(1,))

    def forward(self, stream_btw: Tensor, branch_btw: Tensor) -> Tensor:
        """See the class."""
        total_btw = widened(stream_btw) * self.omega + widened(branch_btw)
        return total_btw.to(torch.promote_types(stream_btw.dtype, branch_btw.dtype))

    def extra_repr(self) -> str:
        """See the class."""
        return f"omega={value_of(self.omega)}"


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

    def reads(self, x_btw: Tensor) -> Tensor:
        """What the branch reads of a stream."""
        return self.norm(x_btw)


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

    def reads(self, x_btw: Tensor) -> Tensor:
        """What the branch reads of a stream."""
        return x_btw


def make_residual(
    placement: str, norm: nn.Module, *, rule: nn.Module | None = None, dropout: float = 0.0
) -> PreNormResidual | PostNormResidual:
    """Return the residual for `placement` "pre" or "post"; `rule` defaults to the plain sum."""
    rule = PlainSum() if rule is None else rule
    if placement == "pre":
        return PreNormResidual(norm, rule, dropout)
    if placement == "post":
        return PostNormResidual(norm, rule, dropout)
    raise ValueError(f"norm_placement: expected 'pre' or 'post', got {placement!r}")
