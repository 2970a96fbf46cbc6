"""Nats and accuracy of an encoder on hidden tokens of whole documents.

A document is read in windows of the context; each token may be hidden in one window only. Which tokens are hidden
depends on the window's place in its document and nothing else, so every model and every evaluation meets the same.

Legend: b windows of a batch, t tokens of a window, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from clearhead.data.tokenizer import Tokenizer
from clearhead.errors import UserError
from clearhead.objectives.cross_entropy import IGNORE
from clearhead.objectives.masked_lm import FRACTION, mask_tokens
from clearhead.train.evaluate import Documents, Float64, Window, choose_windows, sum_by_document
from clearhead.train.world import World

SEED = 20_18  # of the hidden tokens; training draws by its own seeds and steps
_APART = 1 << 32  # documents are shorter than this


@dataclass(frozen=True)
class MaskedScore:
    """One document's part."""

    name: str
    tokens: int
    """Hidden tokens."""
    nats: float
    right: int
    """Hidden tokens that were the model's first guess."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "tokens": self.tokens,
            "nats": self.nats,
            "nats_per_token": self.nats / self.tokens,
            "accuracy": self.right / self.tokens,
        }


@dataclass(frozen=True)
class MaskedResult:
    """The score of a split; every hidden token weighs alike."""

    split: str
    per_document: tuple[MaskedScore, ...]
    context: int
    fraction: float

    @property
    def tokens(self) -> int:
        """Hidden tokens."""
        return sum(score.tokens for score in self.per_document)

    @property
    def nats(self) -> float:
        """Sum over the hidden tokens."""
        return math.fsum(score.nats for score in self.per_document)

    @property
    def nats_per_token(self) -> float:
        """The training loss's unit: nats per hidden token."""
        return self.nats / self.tokens

    @property
    def accuracy(self) -> float:
        """Share of hidden tokens that were the first guess."""
        return sum(score.right for score in self.per_document) / self.tokens

    def metrics(self) -> dict[str, float]:
        """The numbers of the validation curve."""
        return {"loss": self.nats_per_token, "accuracy": self.accuracy}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the documents included."""
        return {
            "split": self.split,
            "nats_per_token": self.nats_per_token,
            "accuracy": self.accuracy,
            "tokens": self.tokens,
            "context": self.context,
            "fraction": self.fraction,
            "documents": [document.to_dict() for document in self.per_document],
        }


def score_masked(
    model: torch.nn.Module,
    data: Documents,
    split: str,
    *,
    tokenizer: Tokenizer,
    mask_token: int,
    fraction: float = FRACTION,
    context: int | None = None,
    batch_size: int = 16,
    max_tokens: int | None = None,
    world: World | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> MaskedResult:
    """Score `model` (an `Encoder`) on the documents of `split`, in its own dtype without autocast, sums in float64.

    Args:
        max_tokens: read about so many tokens (and hide `fraction` of them), spread over all documents; None = all.
        batch_size: windows at a time; changes nothing but speed (and the last bits of rounding).
        world: the processes that share the work; every one of them gets the whole result.
        should_stop: asked before every batch.

    Raises `UserError` when the split has no text, `Interrupted` when `should_stop` answers yes.
    """
    context = data.config.context if context is None else context
    documents = data.documents(split)
    # A window of n targets reads one token more: the one before its first.
    size = max(context - 1, 1)
    chosen = choose_windows([len(document.tokens) - 1 for document in documents], size, size, max_tokens)
    if not chosen:
        raise UserError(f"the {split} split has no text to score")
    device = next(model.parameters()).device
    sums_d3 = sum_by_document(
        model,
        chosen,
        np.zeros((len(documents), 3)),  # hidden tokens, nats, right guesses
        lambda batch: _score(model, documents, batch, tokenizer, mask_token, fraction, device),
        batch_size=batch_size,
        world=world,
        should_stop=should_stop,
    )
    scores = tuple(
        MaskedScore(document.name, int(tokens), float(nats), int(right))
        for document, (tokens, nats, right) in zip(documents, sums_d3, strict=True)
        if tokens
    )
    if not scores:
        raise UserError(f"the {split} split has no token that could be hidden")
    return MaskedResult(split, scores, context, fraction)


@torch.no_grad()
def _score(
    model: torch.nn.Module,
    documents: Sequence[Any],
    batch: Sequence[Window],
    tokenizer: Tokenizer,
    mask_token: int,
    fraction: float,
    device: torch.device,
) -> Float64:
    """Return hidden tokens, nats and right guesses of each window, [b, 3]."""
    longest = 1 + max(window.end - window.start for window in batch)
    tokens_bt = np.zeros((len(batch), longest), dtype=np.int64)
    targets_bt = np.full((len(batch), longest), IGNORE, dtype=np.int64)
    valid_bt = np.zeros((len(batch), longest), dtype=np.bool_)
    for row, window in enumerate(batch):
        # A window's inputs and its last target: all tokens that it speaks of. The first window begins with a separator.
        text = np.asarray(documents[window.document].tokens[window.start : window.end + 1], dtype=np.int64)[None]
        open_ = np.zeros_like(text, dtype=np.bool_)
        open_[:, window.score_from - window.start + 1 :] = True
        masked = mask_tokens(
            text,
            seed=SEED,
            step=window.document * _APART + window.start,
            mask_token=mask_token,
            ordinary=tokenizer.vocab_size,
            special=[tokenizer.separator],
            valid=open_,
            fraction=fraction,
        )
        tokens_bt[row, : text.size], targets_bt[row, : text.size] = masked.tokens[0], masked.targets[0]
        valid_bt[row, : text.size] = True
    with torch.autocast(device.type, enabled=False):
        valid = None if bool(valid_bt.all()) else torch.from_numpy(valid_bt).to(device)
        logits_btV = model(torch.from_numpy(tokens_bt).to(device), valid=valid).float()
        targets = torch.from_numpy(targets_bt).to(device)
        nats_bt = F.cross_entropy(logits_btV.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
        right_bt = (logits_btV.argmax(dim=-1) == targets) & (targets != IGNORE)
    parts = ((targets != IGNORE).sum(1), nats_bt.cpu().double().sum(1), right_bt.sum(1))
    return np.stack([part.cpu().double().numpy() for part in parts], axis=1)
