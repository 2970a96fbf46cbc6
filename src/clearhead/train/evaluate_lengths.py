"""Bits per byte by context length, on the same text at every length: what a model makes of more than it trained on.

For lengths c_1 < ... < c_K and a stride s <= c_1, a document of n predicted tokens is scored in blocks of s targets
that end at e = c_K, c_K + s, c_K + 2s, ... <= n. Length c reads each block through one window:

    inputs   [e - c, e)        read as a text that begins there: positions count from 0
    scored   [e - s, e)        the same targets at every length, each predicted from c - s + 1 .. c inputs

So the lengths differ in nothing but what stands before the scored tokens. Documents with fewer than c_K predicted
tokens hold no such block and are left out at every length, and so are the first c_K - s tokens of the others. The
figure at c is no score of the whole text: compare it with the other lengths', not with a plain evaluation's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from clearhead.errors import UserError
from clearhead.train.evaluate import Documents, EvalResult, Window, evenly, result_of, score_windows, sum_by_document


@dataclass(frozen=True)
class LengthScores:
    """One score for each length, on the same tokens of the same documents."""

    results: tuple[EvalResult, ...]
    """By length, shortest first."""
    trained: int
    """The context that the model was trained at."""
    documents: int
    """Documents scored."""
    left_out: int
    """Documents that are shorter than the longest length."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """The context lengths, in tokens."""
        return tuple(result.context for result in self.results)

    @property
    def tokens(self) -> int:
        """Tokens scored at each length."""
        return self.results[0].tokens

    @property
    def stride(self) -> int:
        """Tokens scored in each window."""
        return self.results[0].stride

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, the documents of each length included."""
        return {
            "trained_context": self.trained,
            "stride": self.stride,
            "tokens": self.tokens,
            "documents_scored": self.documents,
            "documents_left_out": self.left_out,
            "lengths": [result.to_dict() for result in self.results],
        }


def evaluate_lengths(
    model: torch.nn.Module,
    data: Documents,
    split: str,
    lengths: Sequence[int],
    *,
    trained: int,
    stride: int | None = None,
    max_tokens: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> LengthScores:
    """Score the same tokens of `split` with each context length; see the top of this file.

    Args:
        lengths: contexts in tokens, each at least 2.
        trained: the context in training, for the report.
        stride: targets of a window; None = half of the shortest length.
        max_tokens: score about so many tokens, evenly spread, instead of all.

    Raises:
        UserError: for lengths that are no lengths, a length past the end of learned positions, or a split without a
            document as long as the longest length.
        ValueError: for a stride outside 1..shortest length.
    """
    wanted = sorted(set(lengths))
    if not wanted or wanted[0] < 2:
        told = ", ".join(map(str, lengths)) or "none"
        raise UserError(f"--lengths: expected contexts of at least 2 tokens, got {told}")
    last = last_position(model)
    if last is not None and wanted[-1] > last:
        raise UserError(
            f"--lengths: {wanted[-1]} tokens, but this model's learned positions end at {last}; ask for lengths up to "
            f"there, or train with rope, alibi, t5, kerple or fire"
        )
    stride = wanted[0] // 2 if stride is None else stride
    if not 1 <= stride <= wanted[0] or (max_tokens is not None and max_tokens < 1):
        raise ValueError(
            f"evaluate_lengths: expected 1 <= stride <= {wanted[0]}, the shortest length, and max_tokens >= 1, got "
            f"{stride} and {max_tokens}"
        )
    documents = data.documents(split)
    counts = [len(document.tokens) - 1 for document in documents]
    every = [
        Window(d, end - wanted[-1], end - stride, end)
        for d, n in enumerate(counts)
        for end in range(wanted[-1], n + 1, stride)
    ]
    if not every:
        raise UserError(
            f"--lengths: no document of the {split} split has {wanted[-1]} tokens (the longest has "
            f"{max(counts, default=0):,}); ask for shorter lengths, or for other text with --data"
        )
    chosen = evenly(every, len(every) * stride, max_tokens)
    tokens_d = np.zeros(len(documents), dtype=np.int64)
    np.add.at(tokens_d, [window.document for window in chosen], stride)
    device = next(model.parameters()).device
    results = []
    for length in wanted:
        nats_d = sum_by_document(
            model,
            [Window(w.document, w.end - length, w.score_from, w.end) for w in chosen],
            np.zeros(len(documents)),
            lambda batch: score_windows(model, documents, batch, device),
            batch_size=max(1, 16 * wanted[0] // length),
            world=None,
            should_stop=should_stop,
        )
        results.append(result_of(split, documents, tokens_d, nats_d, context=length, stride=stride))
    long_enough = sum(n >= wanted[-1] for n in counts)
    return LengthScores(tuple(results), trained, len(results[0].per_document), len(counts) - long_enough)


def last_position(model: torch.nn.Module) -> int | None:
    """The longest input of a model with learned absolute positions; None for the others."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "position", None) == "learned":
        return int(config.context)
    inner: Any = getattr(config, "max_position_embeddings", None)  # of Hugging Face; a limit only where it is a table
    if inner is None:
        return None
    tables = [
        module for name, module in model.named_modules()
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name.endswith("wpe"))
    ]  # fmt: skip
    return int(inner) if any(table.num_embeddings >= inner for table in tables) else None
