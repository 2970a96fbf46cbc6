"""The sum of -log softmax(logits)[target]: what every objective here is made of.

A sum, not a mean, so that micro-batches and ranks divide once by all valid targets. Legend: b batch, t tokens,
V vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The target that no loss counts (PyTorch's `ignore_index`)."""


def summed_nats(name: str, logits_btV: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum over valid targets of nats, number of valid targets); `name` is the objective's, for the error.

    The sum is taken in fp32 (float64 stays). The count is an int64 tensor on the same device, so that nothing waits for
    the host. Raises `ValueError` when the shapes disagree.
    """
    logits, targets = flat(name, logits_btV, targets_bt)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum"), (targets != IGNORE).sum()


def flat(name: str, logits_btV: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [b t, V] in fp32 or better and targets [b t]."""
    if logits_btV.shape[:-1] != targets_bt.shape:
        raise ValueError(
            f"{name}: expected targets of shape {tuple(logits_btV.shape[:-1])} for logits "
            f"{tuple(logits_btV.shape)}, got {tuple(targets_bt.shape)}"
        )
    logits = logits_btV.flatten(0, -2)
    return logits.float() if logits.dtype.itemsize < 4 else logits, targets_bt.flatten()
