"""`inspect_every`: what the signal looks like inside the model, on the batch of the step that comes next."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.errors import UserError
from clearhead.objectives.causal_lm import IGNORE, causal_lm_loss
from clearhead.signal.watch import Record, SignalWatch
from clearhead.train.config import RunConfig
from clearhead.train.folder import METRICS
from clearhead.train.step import Batch, autocast

FIELDS = {
    "tokens_bt": "tokens",
    "targets_bt": "targets",
    "segments_bt": "segments",
    "source_bs": "source",
    "source_valid_bs": "source_valid",
}
"""Fields of a task's micro-batch, and what `clearhead.signal.measure` calls them."""


class Inspection:
    """Looks every `inspect_every` steps, and remembers up to which step of the run it has looked.

    `earlier` are the records of former starts, so that a resumed run compares with the same first record.
    """

    def __init__(self, config: RunConfig, earlier: Sequence[Record]) -> None:
        self._watch = SignalWatch(config.train.inspect_every, settled=config.optim.warmup_steps)
        self._watch.replay(earlier)
        self._precision = config.train.precision
        self._looked = max((record["step"] for record in earlier), default=-1)

    def due(self, step: int) -> bool:
        """Whether to look now that `step` steps are done."""
        return step > self._looked and self._watch.due(step)

    def look(self, model: nn.Module, batch: Batch, step: int, device: torch.device) -> tuple[Record | None, list[str]]:
        """Return the record (None when the model cannot be measured, which a warning then says) and new warnings."""
        self._looked = step
        named = {
            name: getattr(batch, field) for field, name in FIELDS.items() if getattr(batch, field, None) is not None
        }
        targets = named.pop("targets")
        if "source" in named:  # a translation is padded where nothing has to be said
            valid = targets != IGNORE
            named["valid"] = valid if int(valid.sum(dim=1).max()) > 1 else torch.ones_like(valid)

        def loss(logits_btV: Tensor, _: Any) -> Tensor:
            nats, count = causal_lm_loss(logits_btV, targets)
            return nats / count.clamp_min(1)

        try:
            with autocast(self._precision, device):
                return self._watch.look(model, named, step, loss=loss)
        except UserError as problem:  # weights that are not finite: the run itself says what becomes of it
            return None, [f"step {step}: {problem}"]


def read_records(folder: Path) -> list[Record]:
    """The records that a run's metrics.jsonl holds."""
    path = folder / METRICS
    if not path.exists():
        return []
    events = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [event for event in events if event["kind"] == "signal"]
