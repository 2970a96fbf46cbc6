"""Next-token cross-entropy, as a sum, so that micro-batches and ranks divide once by all valid tokens."""

from __future__ import annotations

from torch import Tensor

from clearhead.objectives.cross_entropy import IGNORE as IGNORE
from clearhead.objectives.cross_entropy import summed_nats


def causal_lm_loss(logits_btV: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum over valid tokens of -log softmax(logits)[target] in nats, number of valid tokens).

    `targets_bt` are the tokens to predict, already shifted; -100 is ignored. The sum is taken in fp32 (float64 stays).
    The count is an int64 tensor on the same device, so that nothing waits for the host.

    Raises `ValueError` when the shapes disagree.
    """
    return summed_nats("causal_lm_loss", logits_btV, targets_bt)
