"""Weights that are no random start: what would be a fault at a start is then an observation, and is not judged.

The theory, its thresholds and the advice are about independent random weights. A trained model departs from them and
may work all the better: a stream that grows a few very large features, or heads that rest on one token, are common in
models that predict well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from clearhead.objectives.causal_lm import IGNORE
from clearhead.signal.findings import Finding
from clearhead.signal.trace import Trace

TOKENS = ("input_ids", "tokens", "source")


def frequency_loss(batch: Any, measured: Trace) -> float | None:
    """Nats a token of the best guess that knows only how often each token occurs in this batch; None without a loss.

    The frequencies are the batch's own, so no guess without context does better on it: a model below this has learned.
    Only where the measured loss is a cross-entropy of the batch's own token ids.
    """
    kind, ids = measured.facts.get("loss_kind"), token_ids(batch)
    if ids is None or kind not in ("next token", "targets", "output"):
        return None
    if kind != "next token":
        targets: Any = batch.get("targets" if kind == "targets" else "labels") if isinstance(batch, Mapping) else None
        if not isinstance(targets, Tensor) or targets.shape != ids.shape or targets.is_floating_point():
            return None
        ids = torch.cat([ids[targets == IGNORE], targets[targets != IGNORE]])  # masked tokens as they were
    counts = torch.bincount(ids.flatten().cpu()).double()
    p = counts[counts > 0] / counts.sum()
    return float(-(p * p.log()).sum())


def token_ids(batch: Any) -> Tensor | None:
    """The token ids [b, t] of a batch, the first stack's; None where there are none."""
    ids = batch
    if isinstance(batch, Mapping):
        ids = next((batch[name] for name in TOKENS if name in batch), None)
    elif isinstance(batch, tuple):
        ids = batch[0] if batch else None
    return ids if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else None


def standing(batch: Any, measured: Trace, findings: Sequence[Finding]) -> tuple[str | None, dict[str, float]]:
    """Return ("trained" | "no forecast" | None for a random start, facts that show it).

    trained: the loss is below `frequency_loss`. no forecast: the stream differs from the theory's by a large factor.
    """
    loss, chance = measured.facts.get("loss"), frequency_loss(batch, measured)
    if loss is not None and chance is not None and math.isfinite(loss) and loss < chance:
        return "trained", {"frequency_loss": chance}
    return ("no forecast" if any(finding.kind == "off_theory" for finding in findings) else None), {}


def observations(findings: Sequence[Finding]) -> tuple[Finding, ...]:
    """The findings as notes, thresholds named as what they are; what is not finite stays a fault."""
    return tuple(
        finding
        if finding.kind == "not_finite"
        else replace(finding, severity="note", evidence=finding.evidence.replace("(a fault", "(at a start a fault"))
        for finding in findings
    )
