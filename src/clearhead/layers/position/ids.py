"""Where each token stands in its own document.

Shapes: valid_bt bool, segments_bt int, positions int64 [b, t] or [1, t] when all rows agree.
"""

from __future__ import annotations

import torch
from torch import Tensor


def position_ids(
    tokens: int,
    *,
    segments_bt: Tensor | None = None,
    first_b: Tensor | None = None,
    offset_b: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """Return 0-based positions that count from a row's first valid token and restart at each new segment.

    `first_b` [b]: index of the first valid token of each row (left padding before it gets position 0).
    `offset_b` [b]: valid tokens of the row that a cache already holds; added to every position.
    `segments_bt`: a new document begins wherever the number differs from its left neighbour's.
    """
    index_1t = torch.arange(tokens, device=device)[None, :]
    origin = torch.zeros_like(index_1t)
    if segments_bt is not None:
        begins_bt = torch.zeros_like(segments_bt, dtype=torch.bool)
        begins_bt[:, 1:] = segments_bt[:, 1:] != segments_bt[:, :-1]
        origin = torch.where(begins_bt, index_1t, 0).cummax(dim=1).values
    if first_b is not None:
        origin = torch.maximum(origin, first_b[:, None])
    positions = (index_1t - origin).clamp_min(0)
    return positions if offset_b is None else positions + offset_b[:, None]
