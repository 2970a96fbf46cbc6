"""Bits per byte of a model with memory on whole documents, read as it was trained: segment by segment.

A document is `separator, x_1 ... x_n`; segments of c inputs follow each other without overlap, and what lies before a
segment comes from the memory, which begins empty with each document. So every token is scored once. Transformer-XL's
memory may be longer than in training; a feedback memory is as long as its model says.

Legend: b documents side by side, t tokens of a segment, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clearhead.errors import UserError
from clearhead.memory.layout import MemoryLayout
from clearhead.objectives.causal_lm import IGNORE
from clearhead.train.evaluate import Documents, EvalResult, Float64, Interrupted, in_turns, result_of
from clearhead.train.world import World


def evaluate_stream(
    model: torch.nn.Module,
    data: Documents,
    split: str,
    *,
    layout: MemoryLayout | str | None = None,
    segment: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    world: World | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Score the documents of `split`, in the model's own dtype without autocast, sums in float64.

    Args:
        model: a `Decoder` or a `FeedbackDecoder`; its training mode is put back afterwards.
        layout: the memory of a `Decoder`; None = the config's.
        segment: tokens read at a time; None = `data.config.context`.
        batch_size: documents side by side; changes nothing but speed (and the last bits of rounding).
        max_tokens: score about so many tokens instead of all: an equal share of each document, from its beginning.
        world, should_stop: see `clearhead.train.evaluate.evaluate`.

    Raises:
        UserError: when the split has no text, or a feedback model is given a layout.
        ValueError: for sizes below 1.
        Interrupted: when `should_stop` answers yes.
    """
    segment = data.config.context if segment is None else segment
    if segment < 1 or batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"evaluate_stream: expected segment, batch_size and max_tokens of at least 1, got {segment}, {batch_size} "
            f"and {max_tokens}"
        )
    config: Any = model.config
    feedback = config.architecture == "feedback"
    if feedback and layout is not None:
        raise UserError(
            f"memory={layout}: architecture=feedback remembers feedback_window={config.feedback_window} tokens, and no "
            f"other number; leave it out"
        )
    documents = data.documents(split)
    lengths = [len(document.tokens) - 1 for document in documents]
    total = sum(lengths)
    if not total:
        raise UserError(f"the {split} split has no text to score")
    share = 1.0 if max_tokens is None else min(1.0, max_tokens / total)
    counts = [min(n, math.ceil(n * share)) for n in lengths]
    # Documents of about one length side by side, so that few rows wait for the longest.
    order = sorted((d for d in range(len(documents)) if counts[d]), key=lambda d: -counts[d])
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    nats_d = np.zeros(len(documents))
    was_training = model.training
    model.eval()
    try:
        for turn, (group, mine) in enumerate(in_turns(groups, world)):
            # Processes of one turn make the same number of calls, for the sake of sharded weights.
            first = turn * (1 if world is None else world.size)
            calls = math.ceil(counts[groups[first][0]] / segment)
            scores = _score(model, documents, group, counts, segment, calls, layout, should_stop)
            if mine:
                nats_d[group] = scores
    finally:
        model.train(was_training)
    if world is not None and world.size > 1:
        nats_d = world.sum(torch.from_numpy(nats_d).to(next(model.parameters()).device)).cpu().numpy()
    if feedback:
        remembered = f"feedback:{config.feedback_window}"
    else:
        remembered = config.memory if layout is None else str(MemoryLayout.parse(layout))
    return result_of(split, documents, counts, nats_d, context=segment, stride=segment, memory=remembered)


@torch.no_grad()
def _score(
    model: Any,
    documents: Sequence[Any],
    group: Sequence[int],
    counts: Sequence[int],
    segment: int,
    calls: int,
    layout: MemoryLayout | str | None,
    should_stop: Callable[[], bool],
) -> Float64:
    """Nats of each document of a group, [b] float64."""
    device = next(model.parameters()).device
    if model.config.architecture == "feedback":
        carried = {"state": model.new_state(len(group))}
    else:
        carried = {"memory": model.new_memory(len(group), layout)}
    nats_b = np.zeros(len(group))
    for call in range(calls):
        if should_stop():
            raise Interrupted
        tokens_bt = np.zeros((len(group), segment), dtype=np.int64)
        targets_bt = np.full((len(group), segment), IGNORE, dtype=np.int64)
        for row, document in enumerate(group):
            end = min((call + 1) * segment, counts[document])
            text = np.asarray(documents[document].tokens[call * segment : end + 1], dtype=np.int64)
            if len(text) > 1:
                tokens_bt[row, : len(text) - 1], targets_bt[row, : len(text) - 1] = text[:-1], text[1:]
        valid_bt = torch.from_numpy(targets_bt != IGNORE).to(device)
        with torch.autocast(device.type, enabled=False):
            logits_btV = model(
                torch.from_numpy(tokens_bt).to(device),
                **carried,
                valid=None if bool(valid_bt.all()) else valid_bt,
            )
            targets = torch.from_numpy(targets_bt).to(device)
            nats_bt = F.cross_entropy(logits_btV.flatten(0, 1).float(), targets.flatten(), reduction="none")
        nats_b += nats_bt.view(len(group), segment).cpu().double().sum(dim=1).numpy()
    return nats_b
