"""Next-token cross-entropy, as a sum, so that micro-batches and ranks divide once by all valid tokens."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100


def causal_lm_loss(logits_btV: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum over valid tokens of -log softmax(logits)[target] in nats, number of valid tokens).

    `targets_bt` are the tokens to predict, already shifted; -100 is ignored. The sum is taken in fp32 (float64 stays).
    The count is an int64 tensor on the same device, so that nothing waits for the host.

    Raises `ValueError` when the shapes disagree.
    """
    if logits_btV.shape[:-1] != targets_bt.shape:
        raise ValueError(
            f"causal_lm_loss: expected targets of shape {tuple(logits_btV.shape[:-1])} for logits "
            f"{tuple(logits_btV.shape)}, got {tuple(targets_bt.shape)}"
        )
    logits = logits_btV.flatten(0, -2)
    if logits.dtype.itemsize < 4:
        logits = logits.float()
    total = F.cross_entropy(logits, targets_bt.flatten(), ignore_index=IGNORE, reduction="sum")
    return total, (targets_bt != IGNORE).sum()
