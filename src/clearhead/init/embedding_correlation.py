"""The token correlation r0 of the summed embedding, which starts DeepScaleLM's recursion. Imports no torch.

Two positions of a sequence share a row of a table with some probability; rows are independent, so that probability is
the table's token correlation, and r0 is the mean over the tables weighted by their variances. For the token table it is
sum p_i^2 over the token distribution.

The often quoted 0.221 is BERT's: three tables of equal variance, of which the segment table alone gives 2/9. With one
or two tables r0 is far smaller; sigma of V and O goes with r^(-1/4).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from clearhead.models.config import ModelConfig


def batch_repetition(tokens_bt: npt.ArrayLike, valid_bt: npt.ArrayLike | None = None) -> float:
    """Share of equal tokens among the pairs of different positions of a sequence, over a batch [b, t].

    Unlike `repetition` of the counts it sees that words return within a text. Padding is left out.
    """
    rows = np.asarray(tokens_bt)
    valid = np.ones(rows.shape, bool) if valid_bt is None else np.asarray(valid_bt, bool)
    equal = pairs = 0
    for row, keep in zip(rows, valid):
        counts = np.unique(row[keep], return_counts=True)[1]
        equal += int((counts * (counts - 1)).sum())
        pairs += int(keep.sum()) * (int(keep.sum()) - 1)
    if not pairs:
        raise ValueError("batch_repetition: expected a sequence of at least two tokens that are not padding")
    return equal / pairs


def sinusoid_correlation(tokens: int, width: int, base: float = 10000.0) -> float:
    """Mean over pairs of positions of the correlation of two sinusoidal position vectors."""
    if tokens < 2:
        return 0.0
    distance = np.arange(1, tokens, dtype=np.float64)
    frequency = base ** (-np.arange(width // 2, dtype=np.float64) / (width // 2))
    mean_d = np.cos(distance[:, None] * frequency).mean(axis=1)
    return float(((tokens - distance) * mean_d).sum() / (tokens - distance).sum())


def config_correlation(config: ModelConfig, repeated: float | None = None, same_segment: float | None = None) -> float:
    """r0 of one of our models before the embedding's dropout.

    repeated: sum p^2 of the tokens; None = by Zipf's law over the vocabulary.
    same_segment: how often two tokens have one segment type; None = 2/3, two segments cut at a uniform place.

    The token, position and segment tables weigh alike. Learned positions never repeat, sinusoidal ones are alike when
    they are near.
    """
    from clearhead.signal.moments.embedding import segment_repetition, zipf_repetition

    tables = [zipf_repetition(config.vocab_size) if repeated is None else repeated]
    if config.position == "learned":
        tables.append(0.0)
    if config.position == "sinusoidal":
        tables.append(sinusoid_correlation(config.context, config.width))
    if config.segment_types:
        tables.append(segment_repetition() if same_segment is None else same_segment)
    return sum(tables) / len(tables)


def token_repetition(model: object, batch: Any, stack: str | None = None) -> float:
    """`batch_repetition` of the tokens that a batch holds for `stack`, padding left out."""
    from clearhead.init.admin import padding_mask

    tokens = batch_tokens(model, batch, stack)
    mask = padding_mask(model, batch, stack or "encoder")
    if mask is not None and mask.shape != tokens.shape:
        mask = None
    return batch_repetition(tokens.cpu().numpy(), None if mask is None else mask.cpu().numpy())


def batch_tokens(model: object, batch: Any, stack: str | None = None) -> Any:
    """The token ids [b, t] that a batch holds for `stack`; of two texts the source, where no stack is named.

    The batch is token ids, or the model's arguments as a mapping or tuple. Raises `ValueError` when it holds none.
    """
    tokens: Any = batch
    names = {"decoder": ("decoder_input_ids", "tokens_bt", "tokens", "input_ids", "source_bs")}
    if isinstance(batch, Mapping):
        order = names.get(stack or "", ("source_bs", "input_ids", "tokens_bt", "tokens"))
        tokens = next((batch[name] for name in order if batch.get(name) is not None), None)
    elif isinstance(batch, tuple):
        tokens = batch[-1] if stack == "decoder" else batch[0]
    if not hasattr(tokens, "is_floating_point") or tokens.is_floating_point() or tokens.dim() != 2:
        raise ValueError("batch: expected token ids [batch, tokens], to read from it how often tokens repeat")
    return tokens
