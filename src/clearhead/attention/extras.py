"""Extras: what a reader of an attention wants to see, computed only when asked, in blocks of rows, detached."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clearhead.attention.call import Call
from clearhead.attention.reference import DENSE_WEIGHTS, visible_scores
from clearhead.attention.spec import Performer
from clearhead.attention.terms import Rows
from clearhead.errors import unknown

NAMES = ("weights", "entropy", "lse", "max_score", "max_weight", "visible")
BLOCK = 256


@torch.no_grad()
def measure(call: Call, names: Sequence[str]) -> dict[str, Tensor]:
    """Return each named extra: "weights" [b, h, n, m]; the others one number a row, [b, h, n].

    "entropy" is -sum w log w of the softmax weights in nats; "lse" the log of the sum of exp(score); "max_score" the
    largest visible score; "max_weight" the largest weight of the mechanism; "visible" how many keys a query sees.
    A row without keys has weights 0, entropy 0, max_weight 0, lse and max_score -inf.
    """
    for name in names:
        if name not in NAMES:
            raise unknown("extra", name, NAMES)
    refuse_extras(call, names)
    _, _, _, n, m = call.sizes
    keys = torch.arange(m, device=call.q.device)
    parts: dict[str, list[Tensor]] = {name: [] for name in names}
    for first in range(0, max(n, 1), BLOCK):
        q = call.q[:, :, first : first + BLOCK]
        rows = Rows(torch.arange(first, first + q.shape[2], device=q.device), keys, call.mask.resolved_offset())
        scores, visible = visible_scores(
            q, call.k, call.mask, call.bias, call.scale, rows, call.spec.weights, call.projection
        )
        weights = DENSE_WEIGHTS[type(call.spec.weights)](call.spec.weights, scores, visible)
        x = scores.masked_fill(~visible, float("-inf"))
        for name in names:
            parts[name].append(_one(name, weights, visible, x))
    return {name: torch.cat(blocks, dim=2) for name, blocks in parts.items()}


def refuse_extras(call: Call, names: Sequence[str]) -> None:
    """Raise `ValueError` for what a performer cannot tell; it tells the rest of the kernel's own log instead of scores.

    Of a recurrent state nothing but the output is known, and the trigonometric kernel has no log.
    """
    if call.sums is not None:
        raise ValueError("want: a performer's recurrent state holds no keys to tell about; look at a call without it")
    missing = [name for name in names if name not in ("weights", "max_weight", "visible")]
    if isinstance(call.spec.weights, Performer) and not call.spec.weights.rows_sum_to_one and missing:
        raise ValueError(f"want: {', '.join(missing)} need logs, and performer:trigonometric has negative weights")


def _one(name: str, weights: Tensor, visible: Tensor, x: Tensor) -> Tensor:
    if name == "weights":
        return weights
    if not x.shape[-1] and name.startswith("max"):  # the largest of no keys
        return x.new_full(x.shape[:-1], 0.0 if name == "max_weight" else float("-inf"))
    if name == "max_weight":
        return weights.amax(-1)
    if name == "visible":
        return visible.sum(-1)
    if name == "max_score":
        return x.amax(-1)
    if name == "lse":
        return torch.logsumexp(x, dim=-1)
    log_s = torch.log_softmax(x, dim=-1).masked_fill(~visible, 0.0)
    return -(log_s.exp() * log_s * visible).sum(-1)
