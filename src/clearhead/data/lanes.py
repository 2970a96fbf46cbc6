"""Batches for models with a memory: each row reads on where it stopped.

The packed stream of a split is a circle of N tokens (its last separator is its first). Row b of B begins at
offset + b N / B, where the seed draws the offset, and reads `context` tokens at each step: its lane. So the batch of a
step is a pure function of (seed, step), and a row's document goes on in the next batch under the same number.

Legend: b rows, t tokens.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def lane_starts(circle: int, batch_size: int, seed: int) -> Ints:
    """Where each row begins, [b]."""
    offset = int(np.random.default_rng([seed, 1 << 20]).integers(circle))
    return offset + np.arange(batch_size, dtype=np.int64) * circle // batch_size


def lane_batch(
    stream: npt.NDArray[np.generic], separators: Ints, batch_size: int, context: int, seed: int, step: int
) -> tuple[Ints, Ints, Ints, Ints]:
    """Return tokens, next tokens, document numbers and the stream positions of the next tokens, each [b, t].

    separators: positions of the separators, which open documents, in the circle. A document's number is its place in
    the stream plus the number of documents for each time round, so it differs from that of the same document read
    before.
    """
    circle = len(stream) - 1
    place_bt = lane_starts(circle, batch_size, seed)[:, None] + step * context + np.arange(context, dtype=np.int64)
    lap_bt, index_bt = np.divmod(place_bt, circle)
    tokens_bt = np.asarray(stream[index_bt], dtype=np.int64)
    targets_bt = np.asarray(stream[index_bt + 1], dtype=np.int64)
    number_bt = np.searchsorted(separators, index_bt, side="right") - 1 + lap_bt * len(separators)
    return tokens_bt, targets_bt, number_bt, index_bt + 1
