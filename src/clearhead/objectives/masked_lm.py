"""Masked language modelling: hide some tokens, predict them from both sides (BERT, arXiv 1810.04805, section 3.1).

15 % of a row's tokens are chosen; of these 80 % become the mask token, 10 % a random token, 10 % stay as they are. All
chosen ones are predicted, so a token that stays must be told from one that was put there. Legend: b batch, t tokens,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from clearhead.objectives.cross_entropy import IGNORE, summed_nats

FRACTION, TO_MASK, TO_RANDOM = 0.15, 0.8, 0.1
_STREAM = 0x3A5C  # keeps these draws apart from others that are seeded by (seed, step)


@dataclass(frozen=True)
class Masked:
    """What the model reads and what it should find there; both int64 [b, t]."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    """The hidden token where one was chosen, -100 elsewhere."""


def mask_tokens(
    tokens_bt: npt.NDArray[Any],
    *,
    seed: int,
    step: int,
    mask_token: int,
    ordinary: int,
    special: Sequence[int] = (),
    valid: npt.NDArray[np.bool_] | None = None,
    fraction: float = FRACTION,
) -> Masked:
    """Choose and hide tokens: a pure function of its arguments.

    Of a row with e eligible tokens exactly round(fraction * e) are chosen, at least one if there is any. Eligible is
    what is real (`valid`) and none of `special` and `mask_token`: separators are never hidden. Random tokens are drawn
    from the ids below `ordinary` that are not special (BERT draws from its whole vocabulary, special tokens included).

    Raises `ValueError` for a fraction outside (0, 1], and when there is no ordinary token to draw.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"mask_tokens: expected a fraction in (0, 1], got {fraction}")
    choices = np.setdiff1d(np.arange(ordinary), [*special, mask_token])
    if not choices.size:
        raise ValueError(f"mask_tokens: expected an ordinary token below {ordinary}, all of them are special")
    eligible_bt = ~np.isin(tokens_bt, [*special, mask_token])
    if valid is not None:
        eligible_bt &= valid
    draw = np.random.default_rng([seed, step, _STREAM])
    # The chosen ones are those with the smallest draws of their row; what is not eligible stands last.
    lottery_bt = np.where(eligible_bt, draw.random(tokens_bt.shape), 2.0)
    place_bt = lottery_bt.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    eligible_b = eligible_bt.sum(axis=1)
    count_b = np.where(eligible_b > 0, np.maximum(np.rint(fraction * eligible_b), 1), 0)
    chosen_bt = place_bt < count_b[:, None]

    how_bt = draw.random(tokens_bt.shape)
    random_bt = choices[draw.integers(0, choices.size, size=tokens_bt.shape)]
    tokens = np.array(tokens_bt, dtype=np.int64)
    tokens[chosen_bt & (how_bt < TO_MASK)] = mask_token
    swapped_bt = chosen_bt & (how_bt >= TO_MASK) & (how_bt < TO_MASK + TO_RANDOM)
    tokens[swapped_bt] = random_bt[swapped_bt]
    return Masked(tokens, np.where(chosen_bt, tokens_bt, IGNORE).astype(np.int64))


def masked_lm_loss(logits_btV: Tensor, targets_bt: Tensor) -> tuple[Tensor, Tensor]:
    """Return (sum over chosen tokens of -log softmax(logits)[token] in nats, number of chosen tokens).

    Raises `ValueError` when the shapes disagree.
    """
    return summed_nats("masked_lm_loss", logits_btV, targets_bt)
