"""State tracking: a counter modulo 4 that is set, raised, lowered or left alone; name its value after every token.

    set to v (1 in 25 tokens)        keep, +1, -1 mod 4 (the rest, evenly)

The value is known from the last set and every token after it, so a model must carry it along, and cannot see it in a
window once the set has left it. Legend: b streams, t tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STATES = 4
VOCABULARY = STATES + 3
"""Tokens 0..3 set the counter; 4, 5 and 6 add 0, +1 and -1."""
BANDS = ((0, 3), (4, 7), (8, 15), (16, 31), (32, 63), (64, None))
"""Steps since the last set, in which accuracy is counted."""


@dataclass(frozen=True)
class Streams:
    """Tokens and the counter after each, [b, t] int64, and how many steps ago it was set (-1: never, not scored)."""

    tokens: Tensor
    values: Tensor
    since: Tensor


def draw(streams: int, tokens: int, generator: torch.Generator, *, set_share: float = 0.04) -> Streams:
    """Draw streams; a stream's counter begins unknown and is scored from its first set on."""
    shape = (streams, tokens)
    sets_bt = torch.rand(shape, generator=generator) < set_share
    moves_bt = torch.randint(0, 3, shape, generator=generator)
    starts_bt = torch.randint(0, STATES, shape, generator=generator)
    tokens_bt = torch.where(sets_bt, starts_bt, moves_bt + STATES)
    step_bt = torch.tensor([0, 1, -1])[moves_bt].masked_fill(sets_bt, 0)
    index_t = torch.arange(tokens)
    last_bt = torch.where(sets_bt, index_t, -1).cummax(dim=1).values  # where it was set last
    total_bt = step_bt.cumsum(dim=1)
    from_bt = last_bt.clamp_min(0)
    values_bt = (starts_bt.gather(1, from_bt) + total_bt - total_bt.gather(1, from_bt)) % STATES
    since_bt = torch.where(last_bt >= 0, index_t - last_bt, -1)
    return Streams(tokens_bt, values_bt, since_bt)


def band_names() -> list[str]:
    """How the bands are called in a table."""
    return [f"{low}-{high}" if high is not None else f"{low}+" for low, high in BANDS]


def accuracy_by_band(right_bt: Tensor, since_bt: Tensor) -> dict[str, float | None]:
    """Share of right answers in each band; None where nothing fell into it."""
    answer: dict[str, float | None] = {}
    for name, (low, high) in zip(band_names(), BANDS, strict=True):
        inside = (since_bt >= low) & (since_bt <= (since_bt.max() if high is None else high))
        answer[name] = float(right_bt[inside].double().mean()) if bool(inside.any()) else None
    return answer
