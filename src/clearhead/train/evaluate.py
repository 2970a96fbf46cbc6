"""Bits per byte and perplexity of a model on whole documents.

A document is `separator, x_1 ... x_n`. The separator opens it, so x_1 is predicted from something and every byte of the
text is scored; the separator itself is not. Documents longer than the context are read through windows:

    inputs   [0, c)  [s, s + c)  [2s, 2s + c)  ...        c context, s stride; the last window ends with the document
    scored   all     the targets that no earlier window scored

so each token is scored once, and from the second window on with at least c - s tokens before it. Chunks without overlap
(s = c) are cheaper and flatter short contexts: their first tokens are predicted from almost nothing.

Legend: b windows of a batch, t tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from clearhead.errors import UserError
from clearhead.objectives.causal_lm import IGNORE
from clearhead.train.world import World


class Interrupted(Exception):
    """The person asked to stop while documents were being scored."""


class Documents(Protocol):
    """What `evaluate` needs of the data: `clearhead.data.text.TextData` offers it."""

    config: Any

    def documents(self, split: str) -> Sequence[Any]:
        """Return objects with `name`, `tokens` (separator first) and `bytes`."""


@dataclass(frozen=True)
class DocumentScore:
    """One document's part of an evaluation."""

    name: str
    tokens: int
    """Tokens scored."""
    bytes: float
    """Bytes of text they stand for: the document's own count, or its share when only some windows are scored."""
    nats: float

    @property
    def bits_per_byte(self) -> float:
        """nats / ln 2 / bytes."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """exp(nats / tokens), per token of this tokenizer."""
        return _exp(self.nats / self.tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "nats": self.nats,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
        }


@dataclass(frozen=True)
class EvalResult:
    """The score of a split; totals weigh every byte alike, so a long document counts for more."""

    split: str
    tokens: int
    bytes: float
    nats: float
    per_document: tuple[DocumentScore, ...]
    context: int
    stride: int
    memory: str = ""
    """What the model remembered beyond its context; empty = nothing."""

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def nats_per_token(self) -> float:
        """The training loss's unit."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(nats per token); only models with one tokenizer can be compared by it."""
        return _exp(self.nats_per_token)

    def metrics(self) -> dict[str, float]:
        """The numbers of the validation curve."""
        return {"bits_per_byte": self.bits_per_byte, "loss": self.nats_per_token, "perplexity": self.perplexity}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the documents included."""
        return {
            "split": self.split,
            "bits_per_byte": self.bits_per_byte,
            "perplexity": self.perplexity,
            "nats_per_token": self.nats_per_token,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "context": self.context,
            "stride": self.stride,
            **({"memory": self.memory} if self.memory else {}),
            "documents": [document.to_dict() for document in self.per_document],
        }


@dataclass(frozen=True)
class Window:
    """Inputs [start, end) of a document; the targets of inputs [score_from, end) are scored."""

    document: int
    start: int
    score_from: int
    end: int


def windows(document: int, inputs: int, context: int, stride: int) -> list[Window]:
    """Cover a document of `inputs` predicted tokens; every target is in exactly one window's scored part."""
    made = [Window(document, 0, 0, min(context, inputs))]
    while made[-1].end < inputs:
        end = min(made[-1].end + stride, inputs)
        made.append(Window(document, end - context, made[-1].end, end))
    return made


def choose_windows(lengths: Sequence[int], context: int, stride: int, max_tokens: int | None) -> list[Window]:
    """All windows of all documents, or some that score about `max_tokens`, evenly spread and the same each time."""
    every = [window for d, n in enumerate(lengths) if n > 0 for window in windows(d, n, context, stride)]
    return evenly(every, sum(lengths), max_tokens)


def evenly(every: list[Window], total: int, max_tokens: int | None) -> list[Window]:
    """All windows, which score `total` tokens, or some that score about `max_tokens`, evenly spread."""
    if max_tokens is None or total <= max_tokens:
        return every
    chosen, scored, passed = [], 0, 0
    for window in every:  # take a window whenever the share scored lags behind the share passed
        size = window.end - window.score_from
        if scored * total <= passed * max_tokens:
            chosen.append(window)
            scored += size
        passed += size
    return chosen


T = TypeVar("T")
Float64 = npt.NDArray[np.float64]


def in_turns(batches: Sequence[T], world: World | None) -> Iterator[tuple[T, bool]]:
    """Yield this process's batches, one of every `world.size`, and whether each counts.

    A sharded model needs every process in every forward pass: one without a batch repeats the last, uncounted.
    """
    rank, size = (0, 1) if world is None else (world.rank, world.size)
    for first in range(0, len(batches), size):
        yield batches[min(first + rank, len(batches) - 1)], first + rank < len(batches)


def sum_by_document(
    model: torch.nn.Module,
    chosen: Sequence[Window],
    sums: Float64,
    score: Callable[[Sequence[Window]], Float64],
    *,
    batch_size: int,
    world: World | None,
    should_stop: Callable[[], bool],
) -> Float64:
    """Score windows batch by batch, the model in eval mode, and add what `score` says of each to its document.

    Args:
        sums: zeros, [documents, ...]; filled and returned.
        score: batch of windows -> their scores, [b, ...].

    Every process of `world` gets the whole sums. Raises `Interrupted` when `should_stop` answers yes.
    """
    batches = [chosen[i : i + batch_size] for i in range(0, len(chosen), batch_size)]
    was_training = model.training
    model.eval()
    try:
        for batch, counts in in_turns(batches, world):
            if should_stop():
                raise Interrupted
            scores = score(batch)
            if counts:
                np.add.at(sums, [window.document for window in batch], scores)
    finally:
        model.train(was_training)
    if world is not None and world.size > 1:
        sums = world.sum(torch.from_numpy(sums).to(next(model.parameters()).device)).cpu().numpy()
    return sums


def evaluate(
    model: torch.nn.Module,
    data: Documents,
    split: str,
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    world: World | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvalResult:
    """Score the documents of `split` with `model`, in the model's own dtype without autocast, sums in float64.

    Args:
        model: called as `model(tokens_bt)`, returns logits [b, t, V]; its training mode is put back afterwards.
        context: tokens of a window; None = `data.config.context`.
        stride: targets that each further window scores; None = context // 2.
        batch_size: windows at a time; changes nothing but speed (and the last bits of rounding).
        max_tokens: score about so many tokens instead of all; bytes are then each document's share.
        world: the processes that share the work; every one of them gets the whole result.
        should_stop: asked before every batch.

    Raises:
        UserError: when the split has no text.
        ValueError: for a stride outside 1..context, or sizes below 1.
        Interrupted: when `should_stop` answers yes.
    """
    context = data.config.context if context is None else context
    stride = max(context // 2, 1) if stride is None else stride
    if not 1 <= stride <= context or batch_size < 1 or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"evaluate: expected 1 <= stride <= context={context}, batch_size >= 1 and max_tokens >= 1, got "
            f"{stride}, {batch_size} and {max_tokens}"
        )
    documents = data.documents(split)
    lengths = [len(document.tokens) - 1 for document in documents]
    chosen = choose_windows(lengths, context, stride, max_tokens)
    if not chosen:
        raise UserError(f"the {split} split has no text to score")
    device = next(model.parameters()).device

    nats_d = sum_by_document(
        model,
        chosen,
        np.zeros(len(documents)),
        lambda batch: score_windows(model, documents, batch, device),
        batch_size=batch_size,
        world=world,
        should_stop=should_stop,
    )

    tokens_d = np.zeros(len(documents), dtype=np.int64)
    for window in chosen:
        tokens_d[window.document] += window.end - window.score_from
    return result_of(split, documents, tokens_d, nats_d, context=context, stride=stride)


def result_of(
    split: str,
    documents: Sequence[Any],
    tokens_d: Sequence[int] | npt.NDArray[np.int64],
    nats_d: Float64,
    *,
    context: int,
    stride: int,
    memory: str = "",
) -> EvalResult:
    """Put together what was scored of each document: its tokens, its share of the bytes, its nats."""
    scores = tuple(
        DocumentScore(document.name, int(n), document.bytes * int(n) / (len(document.tokens) - 1), float(nats))
        for document, n, nats in zip(documents, tokens_d, nats_d, strict=True)
        if n
    )
    return EvalResult(
        split=split,
        tokens=sum(score.tokens for score in scores),
        bytes=sum(score.bytes for score in scores),
        nats=math.fsum(score.nats for score in scores),
        per_document=scores,
        context=context,
        stride=stride,
        memory=memory,
    )


@torch.no_grad()
def score_windows(
    model: torch.nn.Module, documents: Sequence[Any], batch: Sequence[Window], device: torch.device
) -> Float64:
    """Return each window's nats, [b] float64. Shorter windows are filled on the right, where no real token looks."""
    longest = max(window.end - window.start for window in batch)
    tokens_bt = np.zeros((len(batch), longest), dtype=np.int64)
    targets_bt = np.full((len(batch), longest), IGNORE, dtype=np.int64)
    for row, window in enumerate(batch):
        text = np.asarray(documents[window.document].tokens[window.start : window.end + 1], dtype=np.int64)
        tokens_bt[row, : len(text) - 1] = text[:-1]
        targets_bt[row, window.score_from - window.start : len(text) - 1] = text[1 + window.score_from - window.start :]
    with torch.autocast(device.type, enabled=False):
        logits_btV = model(torch.from_numpy(tokens_bt).to(device))
        targets = torch.from_numpy(targets_bt).to(device)
        nats_bt = F.cross_entropy(logits_btV.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return nats_bt.view(len(batch), longest).cpu().double().sum(dim=1).numpy()


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
