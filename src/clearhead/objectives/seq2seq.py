"""Cross-entropy of a target text, with label smoothing (Szegedy et al., arXiv 1512.00567, section 7).

    smoothed nats of a token = (1 - s) (-log p[target]) + s * mean over the vocabulary of (-log p)

Legend: b batch, t tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.objectives.cross_entropy import IGNORE, flat, summed_nats


def seq2seq_loss(logits_btV: Tensor, targets_bt: Tensor, *, smoothing: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Return (what to minimise, the plain nats, number of valid targets), sums over the valid targets.

    The first is smoothed, the second is not: only plain nats of different runs can be compared. Without smoothing they
    are one tensor. -100 is ignored. Raises `ValueError` when the shapes disagree, and for smoothing outside [0, 1).
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"seq2seq_loss: expected smoothing in [0, 1), got {smoothing}")
    if smoothing == 0.0:
        nats, count = summed_nats("seq2seq_loss", logits_btV, targets_bt)
        return nats, nats, count
    with torch.no_grad():
        nats, count = summed_nats("seq2seq_loss", logits_btV, targets_bt)
    logits, targets = flat("seq2seq_loss", logits_btV, targets_bt)
    smoothed = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum", label_smoothing=smoothing)
    return smoothed, nats, count
