"""Self-Adjust Softmax (arXiv 2502.18277): softmax weights times a ramp of the score itself.

With x the scores over visible keys (scaled, bias added), s = softmax(x), l = min x and u = max x over the row:

    product     w = x s
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

and d low, d high are added where the extrema stand (shared evenly between ties) unless detached.
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
        s, a, at, denominator = self._parts(scores, hide)
        factor = None if denominator is None else denominator.reciprocal()
        s_times_g = gradient_w.mul_(s)
        w = s * a
        pull = None if at is None else s_times_g.sum(dim=-1, keepdim=True)
        direct = a.add_(1.0) if factor is None else a.add_(1.0).mul_(factor)
        d_scores = s_times_g.mul_(direct).addcmul_(s, delta, value=-1.0)
        if at is not None and pull is not None:
            self._add_at_extrema(d_scores, at, pull, delta, factor)
        return d_scores, w, factor

    def _parts(self, x: Tensor, hide: Hidden) -> tuple[Tensor, Tensor, tuple[At, At] | None, Tensor | None]:
        """s, a = x - low (in x's memory), where low and high are reached (None if not needed), and D."""
        s = hide.softmax(x)
        if self.form == "product":
            return s, hide.fill_(x, 0.0), None, None
        if self.form == "range":
            # A hidden score of 0 changes neither min(l, 0) nor max(u, 0).
            hide.fill_(x, 0.0)
            low, high = x.amin(-1, keepdim=True).clamp_(max=0.0), x.amax(-1, keepdim=True).clamp_(min=0.0)
            at = None if self.detach else (At(x, low, low < 0.0), At(x, high, high > 0.0))
            return s, x.sub_(low), at, (high - low).add_(EPS)
        high = x.amax(-1, keepdim=True)
        at_high = None if self.detach else At(x, high)
        low = hide.fill_(x, float("inf")).amin(-1, keepdim=True)
        at_low = None if self.detach else At(x, low)
        if hide.empty_possible:
            empty = low == float("inf")
            low, high = low.masked_fill_(empty, 0.0), high.masked_fill_(empty, 0.0)
        hide.fill_(x, 0.0)
        at = None if at_low is None or at_high is None else (at_low, at_high)
        return s, x.sub_(low), at, (high - low).add_(EPS) if self.form == "minmax" else None

    def _add_at_extrema(
        self, d_scores: Tensor, at: tuple[At, At], pull: Tensor, delta: Tensor, factor: Tensor | None
    ) -> None:
        at_low, at_high = at
        if factor is None:  # min_shift: no maximum, no denominator
            at_low.add_(d_scores, pull.neg_())
            return
        at_low.add_(d_scores, (delta - pull) * factor)
        at_high.add_(d_scores, delta * factor.neg())


class At:
    """Where a row reaches an extremum, as ones in a tile of zeros; ties share a gradient evenly, as `amin`'s do.

    A comparison into a float tensor is vectorised on a CPU; argmin, and comparisons into bool, are ten times slower.
    """

    def __init__(self, x: Tensor, extremum: Tensor, counts: Tensor | None = None) -> None:
        """`counts` [.., 1] bool says in which rows the extremum is the row's own (and not the 0 of `range`)."""
        self.ones = torch.eq(x, extremum, out=torch.empty_like(x))
        self.counts = counts

    def add_(self, d_scores: Tensor, gradient: Tensor) -> None:
        """Add each row's gradient where its extremum stands."""
        share = gradient / self.ones.sum(-1, keepdim=True).clamp_(min=1.0)
        d_scores.addcmul_(self.ones, share if self.counts is None else share * self.counts)
