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

import math

import torch
from torch import Tensor

from clearhead.attention.reference import EPS
from clearhead.attention.spec import SelfAdjust
from clearhead.kernels.rule import Hidden, Scratch, TileRule, tile_rule


@tile_rule(SelfAdjust)
class SelfAdjustTile(TileRule):
    """The tile rule (see `kernels/rule.py`). Its time is passes over a tile; docs/self-adjust-speed.md counts them."""

    def __init__(self, choice: SelfAdjust) -> None:
        self.form = choice.form
        self.detach = choice.detach_extrema or choice.form == "product"
        self.scratch = Scratch("self_adjust")

    def weights(self, scores: Tensor, hide: Hidden) -> tuple[Tensor, Tensor | None]:
        """See `TileRule.weights`; the division by D is left to the output, which is narrower."""
        s, low, _, factor = self._parts(scores, hide)
        return s.mul_(scores if low is None else scores.sub_(low)), factor

    def backward(
        self, scores: Tensor, hide: Hidden, gradient_w: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See the top of this file."""
        s, low, high, factor = self._parts(scores, hide)
        spare = self.scratch.take("spare", scores.shape, scores)
        a = scores if low is None else torch.sub(scores, low, out=spare)
        d_scores = gradient_w.addcmul_(gradient_w, a)  # g (a + 1)
        if factor is not None:
            d_scores.mul_(factor)
        d_scores.sub_(delta).mul_(s)
        w = s.mul_(a)
        if low is not None and not self.detach:
            if self.form != "range":
                hide.fill_(scores, math.nan)  # equal to no extremum, not even to one of 0
            self._add_at_extrema(d_scores, scores, low, high, delta, factor)
        return d_scores, w, factor

    def _parts(self, x: Tensor, hide: Hidden) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """s, low, high (None where the form has none) and 1 / D; hidden scores become 0."""
        s = hide.softmax(x, out=self.scratch.take("s", x.shape, x))
        if self.form == "product":
            hide.fill_(x, 0.0)
            return s, None, None, None
        if self.form == "range":
            # A hidden score of 0 changes neither min(l, 0) nor max(u, 0).
            hide.fill_(x, 0.0)
            low, high = x.amin(-1, keepdim=True).clamp_(max=0.0), x.amax(-1, keepdim=True).clamp_(min=0.0)
            return s, low, high, (high - low).add_(EPS).reciprocal_()
        high = x.amax(-1, keepdim=True)
        low = hide.fill_(x, math.inf).amin(-1, keepdim=True)
        if hide.empty_possible:
            empty = low == math.inf
            low, high = low.masked_fill_(empty, 0.0), high.masked_fill_(empty, 0.0)
        hide.fill_(x, 0.0)
        return s, low, high, (high - low).add_(EPS).reciprocal_() if self.form == "minmax" else None

    def _add_at_extrema(
        self, d_scores: Tensor, x: Tensor, low: Tensor, high: Tensor | None, delta: Tensor, factor: Tensor | None
    ) -> None:
        """Add d low and d high where they stand, shared evenly between ties, as the gradient of `amin` is.

        sum_k s_k g_k / D needs no pass of its own: where s sums to 1 it is the sum of the direct part.
        """
        pull = d_scores.sum(dim=-1, keepdim=True)
        if factor is None:  # min_shift: no maximum, no denominator
            self._add_where(d_scores, x, low, pull.neg_())
            return
        assert high is not None
        push = delta * factor
        if self.form == "range":  # the 0 of `range` is a constant
            self._add_where(d_scores, x, low, (push - pull).mul_(low < 0.0))
            self._add_where(d_scores, x, high, push.neg_().mul_(high > 0.0))
        else:
            self._add_where(d_scores, x, low, push - pull)
            self._add_where(d_scores, x, high, push.neg_())

    def _add_where(self, d_scores: Tensor, x: Tensor, extremum: Tensor, gradient: Tensor) -> None:
        """A comparison into a float tensor is vectorised on a CPU; argmin, or one into bool, is ten times slower."""
        ones = torch.eq(x, extremum, out=self.scratch.take("spare", x.shape, x))
        d_scores.addcmul_(ones, gradient / ones.sum(-1, keepdim=True).clamp_(min=1.0))
