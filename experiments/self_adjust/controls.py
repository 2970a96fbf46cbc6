"""One part of Self-Adjust Softmax at a time, as weights of their own: what would explain a gain?

With s = softmax(x), w = Self-Adjust's weights of the same scores (`attention/self_adjust.py`), R their row sum:

    row_sum    R s                        Self-Adjust's row sum, softmax's distribution: a gate that the scores compute
    shape      (w + e s) / (R + e)        Self-Adjust's distribution, row sum 1 (e = 1e-3: a row of zeros is softmax's)
    gradient   s, with the gradient of w  softmax's function, Self-Adjust's gradient in the scores
    values     w, with the gradient of s  Self-Adjust's function, softmax's gradient in the scores

The last two are not the gradient of what is computed; that is their purpose, and why numeric differences refute them.
In single precision a row of one or two keys loses digits under shape, where R may be next to nothing.

A plug-in of one file, as CONTRIBUTING describes, so that the workers of a comparison know it:
`CLEARHEAD_PLUGINS=experiments/self_adjust/controls.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from clearhead.attention.reference import dense_weights, self_adjust_weights, softmax_weights
from clearhead.attention.self_adjust import SelfAdjustTile
from clearhead.attention.spec import SelfAdjust, Softmax, Weights, register
from clearhead.errors import UserError, unknown
from clearhead.kernels.rule import Hidden, TileRule, tile_rule

EPS = 1e-3


@register("self_adjust_part")
@dataclass(frozen=True)
class SelfAdjustPart(Weights):
    """One part of `SelfAdjust(form, detach_extrema)`; see the top of this file."""

    keep: str = "row_sum"
    form: str = "range"
    detach_extrema: bool = False

    KEEPS: ClassVar[tuple[str, ...]] = ("row_sum", "shape", "gradient", "values")

    def __post_init__(self) -> None:
        if self.keep not in self.KEEPS:
            raise unknown("self_adjust_part: keep", self.keep, self.KEEPS)
        if self.keep == "shape" and self.whole.form == "product":
            raise UserError("self_adjust_part: the rows of product sum to any sign, so they cannot be divided by it")

    @property
    def whole(self) -> SelfAdjust:
        """What this is a part of."""
        return SelfAdjust(self.form, self.detach_extrema)


@dense_weights(SelfAdjustPart)
def part_weights(choice: SelfAdjustPart, scores: Tensor, visible: Tensor) -> Tensor:
    """The formulas at the top of this file."""
    s = softmax_weights(Softmax(), scores, visible)
    w = self_adjust_weights(choice.whole, scores, visible)
    if choice.keep == "row_sum":
        return s * w.sum(dim=-1, keepdim=True)
    if choice.keep == "shape":
        mixed = w + EPS * s
        some = visible.any(dim=-1, keepdim=True)
        return mixed / mixed.sum(dim=-1, keepdim=True).masked_fill(~some, 1.0)
    if choice.keep == "gradient":
        return s.detach() + w - w.detach()
    return w.detach() + s - s.detach()


@tile_rule(SelfAdjustPart)
class PartTile(TileRule):
    """Built on the tile rule of the whole; no faster than that, and as short of memory."""

    def __init__(self, choice: SelfAdjustPart) -> None:
        self.keep = choice.keep
        self.whole = SelfAdjustTile(choice.whole)

    def weights(self, scores: Tensor, hide: Hidden) -> tuple[Tensor, Tensor | None]:
        """See `TileRule.weights`."""
        if self.keep == "gradient":
            return hide.softmax(scores), None
        if self.keep == "values":
            return self.whole.weights(scores, hide)
        s = hide.softmax(scores.clone())
        w = self._whole(scores, hide)
        if self.keep == "row_sum":
            return s, w.sum(dim=-1, keepdim=True)
        mixed = w.add_(s, alpha=EPS)
        return mixed, _inverse(mixed)

    def backward(
        self, scores: Tensor, hide: Hidden, gradient_w: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """With J the gradient rule of the whole, S that of softmax, g the gradient of the weights:

        row_sum R S(g) + (s.g) J(1); shape J(g') + e S(g') with g' = (g - delta) / (R + e); gradient J(g); values S(g).
        """
        s = hide.softmax(scores.clone())
        if self.keep == "row_sum":
            along = (s * gradient_w).sum(dim=-1, keepdim=True)
            total = self._whole(scores.clone(), hide).sum(dim=-1, keepdim=True)
            of_total = self.whole.backward(scores, hide, torch.ones_like(s), total)[0]
            return _softmax_gradient(s, gradient_w).mul_(total).add_(of_total.mul_(along)), s, total
        if self.keep == "values":
            w, factor = self.whole.weights(scores, hide)
            return _softmax_gradient(s, gradient_w), w, factor
        w = self._whole(scores.clone(), hide)
        if self.keep == "gradient":
            along = (w * gradient_w).sum(dim=-1, keepdim=True)
            return self.whole.backward(scores, hide, gradient_w, along)[0], s, None
        mixed = w + EPS * s
        inverse = _inverse(mixed)
        inner = (gradient_w - delta) * inverse
        along = (inner * w).sum(dim=-1, keepdim=True)
        of_softmax = _softmax_gradient(s, inner)
        return self.whole.backward(scores, hide, inner, along)[0].add_(of_softmax, alpha=EPS), mixed, inverse

    def _whole(self, scores: Tensor, hide: Hidden) -> Tensor:
        w, factor = self.whole.weights(scores, hide)
        return w if factor is None else w.mul_(factor)


def _softmax_gradient(s: Tensor, g: Tensor) -> Tensor:
    return s * (g - (s * g).sum(dim=-1, keepdim=True))


def _inverse(mixed: Tensor) -> Tensor:
    """1 / row sum; 0 for a row that sees nothing."""
    total = mixed.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, total.clamp_min(torch.finfo(total.dtype).tiny).reciprocal(), 0.0)
