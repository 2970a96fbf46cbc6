"""Self-Adjust Softmax (arXiv 2502.18277): softmax weights times a ramp of the score itself.

With x the scores over visible keys (scaled, bias added), s = softmax(x), l = min x and u = max x over the row:

    product     w = x s                                     (the sheet's V0)
    min_shift   w = (x - l) s                               (V1)
    minmax      w = (x - l) / (u - l + eps) s               (V2)
    range       w = (x - min(l,0)) / (max(u,0) - min(l,0) + eps) s      (V3, the paper's normalised default)

eps = 1e-10, in the denominator only. Rows are not renormalised: their sum is not 1. The weights are not invariant to a
shift of x, so constant biases, ALiBi slopes and the scale of queries and keys matter. A row of zero scores gives
output 0 under `range` (which jumps there when a single key is visible: weight 1 just above 0, weight 0 below). Train
from scratch: weights of a softmax model do not carry over.

`detach_extrema` treats l and u as constants in the backward pass. Without it, `range` loses its gradient when
saturated on a positive top score, as softmax does; with it, it does not.

Gradient, with g = d w, delta = sum_k g_k w_k, a = x - low, D the denominator (1 where there is none):

    dx_i   = s_i (g_i (a_i + 1) / D - delta)
    d low  = -(sum_k s_k g_k - delta) / D  (min_shift: -sum_k s_k g_k)      d high = -delta / D

and d low, d high are added at the positions of the extrema (the first one, when there are ties) unless detached.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearhead.attention.reference import EPS
from clearhead.attention.spec import SelfAdjust
from clearhead.kernels.rule import Hidden, TileRule, tile_rule


@tile_rule(SelfAdjust)
class SelfAdjustTile(TileRule):
    """The tile rule (see `kernels/rule.py`)."""

    def __init__(self, choice: SelfAdjust) -> None:
        self.form = choice.form
        self.detach = choice.detach_extrema or choice.form == "product"

    def weights(self, scores: Tensor, hide: Hidden) -> tuple[Tensor, Tensor | None]:
        """See `TileRule.weights`; the division by D is left to the output, which is narrower."""
        s, a, _, denominator = self._parts(scores, hide)
        return s.mul_(a), None if denominator is None else denominator.reciprocal()

    def backward(
        self, scores: Tensor, hide: Hidden, gradient_w: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See the top of this file."""
        s, a, extrema, denominator = self._parts(scores, hide)
        factor = None if denominator is None else denominator.reciprocal()
        s_times_g = gradient_w.mul_(s)
        w = s * a
        pull = None if self.detach else s_times_g.sum(dim=-1, keepdim=True)
        direct = a.add_(1.0) if factor is None else a.add_(1.0).mul_(factor)
        d_scores = s_times_g.mul_(direct).addcmul_(s, delta, value=-1.0)
        if pull is not None:
            self._add_at_extrema(d_scores, extrema, pull, delta, factor)
        return d_scores, w, factor

    def _parts(self, x: Tensor, hide: Hidden) -> tuple[Tensor, Tensor, Extrema | None, Tensor | None]:
        """s, a = x - low (in x's memory), where the extrema stand (None if not needed), and D."""
        s = hide.softmax(x)
        if self.form == "product":
            return s, hide.fill_(x, 0.0), None, None
        if self.form == "range":
            # A hidden score of 0 changes neither min(l, 0) nor max(u, 0).
            hide.fill_(x, 0.0)
            low, high = x.amin(-1, keepdim=True).clamp_(max=0.0), x.amax(-1, keepdim=True).clamp_(min=0.0)
            extrema = None if self.detach else Extrema.of(x, low < 0.0, high > 0.0)
            return s, x.sub_(low), extrema, (high - low).add_(EPS)
        high = x.amax(-1, keepdim=True)
        at_high = None if self.detach else position_of(x, torch.amax)
        low = hide.fill_(x, float("inf")).amin(-1, keepdim=True)
        at_low = None if self.detach else position_of(x, torch.amin)
        if hide.empty_possible:
            empty = low == float("inf")
            low, high = low.masked_fill_(empty, 0.0), high.masked_fill_(empty, 0.0)
        hide.fill_(x, 0.0)
        a = x.sub_(low)
        extrema = None if at_low is None or at_high is None else Extrema(at_low, at_high, None, None)
        return s, a, extrema, (high - low).add_(EPS) if self.form == "minmax" else None

    def _add_at_extrema(
        self, d_scores: Tensor, extrema: Extrema | None, pull: Tensor, delta: Tensor, factor: Tensor | None
    ) -> None:
        assert extrema is not None
        if factor is None:  # min_shift: no maximum, no denominator
            d_scores.scatter_add_(-1, extrema.at_low, pull.neg_())
            return
        d_low, d_high = (delta - pull) * factor, delta * factor.neg()
        if extrema.low_counts is not None and extrema.high_counts is not None:
            d_low, d_high = d_low * extrema.low_counts, d_high * extrema.high_counts
        d_scores.scatter_add_(-1, extrema.at_low, d_low).scatter_add_(-1, extrema.at_high, d_high)


class Extrema:
    """Where a row's minimum and maximum stand, and (for `range`) whether they are below and above zero."""

    def __init__(self, at_low: Tensor, at_high: Tensor, low_counts: Tensor | None, high_counts: Tensor | None) -> None:
        self.at_low, self.at_high = at_low, at_high
        self.low_counts, self.high_counts = low_counts, high_counts

    @classmethod
    def of(cls, x: Tensor, low_counts: Tensor, high_counts: Tensor) -> Extrema:
        """Find both in `x`."""
        return cls(position_of(x, torch.amin), position_of(x, torch.amax), low_counts, high_counts)


def position_of(x: Tensor, reduce: object) -> Tensor:
    """Index of the extremum in the last dimension, [..., 1].

    PyTorch's argmin and argmax are scalar loops on a CPU, ten times slower than amin and amax. So: reduce 16
    interleaved parts to one with the vectorised reduction, search the short rest, then look into the one column that
    holds it.
    """
    argument = torch.argmin if reduce is torch.amin else torch.argmax
    width, parts = x.shape[-1], 16
    if width % parts or width < 8 * parts or not x.is_contiguous():
        return argument(x, dim=-1, keepdim=True)
    columns = x.unflatten(-1, (parts, width // parts))
    column = argument((torch.amin if reduce is torch.amin else torch.amax)(columns, dim=-2), dim=-1, keepdim=True)
    chosen = columns.gather(-1, column.unsqueeze(-2).expand(*columns.shape[:-1], 1)).squeeze(-1)
    return argument(chosen, dim=-1, keepdim=True) * (width // parts) + column
