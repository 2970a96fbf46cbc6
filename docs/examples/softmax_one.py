"""A mechanism in one file: softmax with one more in the denominator, so that a query may attend to nothing.

    w_i = exp(x_i) / (1 + sum_j exp(x_j))

(E. Miller, "Attention is off by one", a note of 2023.) Everything a mechanism needs is here: its place in the grammar,
its dense formula, and a rule that lets it ride on the chunked kernel. Try it on real text, beside plain softmax:

    CLEARHEAD_PLUGINS=docs/examples/softmax_one.py clearhead compare --attention softmax softmax_one --preset quick

and hold it to the contract that every built-in mechanism obeys:

    CLEARHEAD_PLUGINS=docs/examples/softmax_one.py python -m pytest tests/contract.py -k softmax_one
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clearhead.attention.reference import dense_weights
from clearhead.attention.spec import Weights, register
from clearhead.kernels.rule import Hidden, TileRule, tile_rule


# 1. The grammar. `rows_sum_to_one` stays False, so `softmax_one+laser` is refused, with the reason.
@register("softmax_one")
@dataclass(frozen=True)
class SoftmaxOne(Weights):
    """w_i = exp(x_i) / (1 + sum_j exp(x_j))."""


# 2. The truth, written for reading. This alone is enough: the reference backend runs it, gradients and all.
@dense_weights(SoftmaxOne)
def softmax_one(choice: SoftmaxOne, scores: Tensor, visible: Tensor) -> Tensor:
    """A key of score 0 and no value, dropped after the softmax, is the one in the denominator."""
    hidden = scores.masked_fill(~visible, float("-inf"))
    with_one = torch.cat([torch.zeros_like(hidden[..., :1]), hidden], dim=-1)
    return with_one.softmax(dim=-1)[..., 1:]


# 3. The fast path: what a tile of whole rows does, forward and backward. Memory stays linear in length.
@tile_rule(SoftmaxOne)
class SoftmaxOneTile(TileRule):
    """softmax(x) * Z / (1 + Z), with the last factor left to the output."""

    def __init__(self, choice: SoftmaxOne) -> None:
        pass

    def weights(self, scores: Tensor, hide: Hidden) -> tuple[Tensor, Tensor | None]:
        """Z / (1 + Z) = sigmoid(log Z)."""
        s = hide.softmax(scores)
        return s, torch.logsumexp(scores, dim=-1, keepdim=True).sigmoid_()

    def backward(
        self, scores: Tensor, hide: Hidden, gradient_w: Tensor, delta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """dx_i = w_i (g_i - sum_k w_k g_k): softmax's own form, since the dropped key takes no part in g."""
        s, factor = self.weights(scores, hide)
        assert factor is not None
        return gradient_w.sub_(delta).mul_(s).mul_(factor), s, factor
