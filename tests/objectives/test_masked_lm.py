"""Hiding tokens by BERT's recipe: how many, which, how, and always the same ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clearhead.objectives.masked_lm import mask_tokens, masked_lm_loss

MASK, SEPARATOR = 257, 256
OPTIONS = {"mask_token": MASK, "ordinary": 257, "special": [SEPARATOR]}


def text(rows: int = 200, tokens: int = 128) -> np.ndarray:
    draw = np.random.default_rng(7)
    ids = draw.integers(0, 256, size=(rows, tokens))
    ids[:, ::30] = SEPARATOR
    return ids


def test_fifteen_percent_of_each_row_and_eighty_ten_ten():
    ids = text()
    masked = mask_tokens(ids, seed=0, step=0, **OPTIONS)
    chosen = masked.targets != -100
    eligible = (ids != SEPARATOR).sum(axis=1)
    assert (chosen.sum(axis=1) == np.rint(0.15 * eligible)).all()
    total = chosen.sum()
    to_mask = (masked.tokens[chosen] == MASK).mean()
    kept = (masked.tokens[chosen] == ids[chosen]).mean()
    # Of the random tokens 1 in 256 is the old one by chance.
    for share, expected in ((to_mask, 0.8), (kept, 0.1 + 0.1 / 256), (1 - to_mask - kept, 0.1 * 255 / 256)):
        assert abs(share - expected) < 4 * np.sqrt(expected * (1 - expected) / total)
    assert (masked.targets[chosen] == ids[chosen]).all()
    assert (masked.tokens[~chosen] == ids[~chosen]).all()


def test_places_and_random_tokens_are_spread_evenly():
    ids = np.full((2000, 40), 5)
    masked = mask_tokens(ids, seed=1, step=0, mask_token=20, ordinary=20, special=[19])
    chosen = masked.targets != -100
    by_place = chosen.mean(axis=0)
    assert abs(by_place - 0.15).max() < 5 * np.sqrt(0.15 * 0.85 / 2000)
    swapped = masked.tokens[chosen & (masked.tokens != 20) & (masked.tokens != 5)]
    assert sorted(set(swapped.tolist())) == [n for n in range(19) if n != 5]  # never the separator, never the mask
    counts = np.bincount(swapped, minlength=19)[[n for n in range(19) if n != 5]]
    assert counts.min() > 0.6 * counts.mean()


def test_separators_masks_and_padding_are_never_chosen():
    ids = text(50)
    ids[:, 7] = MASK
    valid = np.broadcast_to(np.arange(128) < 90, ids.shape)
    masked = mask_tokens(ids, seed=0, step=0, valid=valid, fraction=1.0, **OPTIONS)
    chosen = masked.targets != -100
    assert (chosen == (valid & (ids != SEPARATOR) & (ids != MASK))).all()
    nothing = mask_tokens(np.full((2, 5), SEPARATOR), seed=0, step=0, **OPTIONS)
    assert (nothing.targets == -100).all()
    one = mask_tokens(np.array([[1, SEPARATOR]]), seed=0, step=0, **OPTIONS)
    assert one.targets.tolist() == [[1, -100]]  # at least one, where there is any


def test_a_pure_function_of_tokens_seed_and_step():
    ids = text(4)
    before = ids.copy()

    def hidden(seed: int, step: int, rows: np.ndarray = ids) -> np.ndarray:
        return mask_tokens(rows, seed=seed, step=step, **OPTIONS).tokens

    assert (hidden(3, 5) == hidden(3, 5)).all()
    assert (ids == before).all()
    assert (hidden(3, 5) != hidden(3, 6)).any()
    assert (hidden(3, 5) != hidden(4, 5)).any()
    assert (hidden(3, 5) != hidden(5, 3)).any()


def test_arguments():
    with pytest.raises(ValueError, match="a fraction in"):
        mask_tokens(text(1), seed=0, step=0, fraction=0.0, **OPTIONS)
    with pytest.raises(ValueError, match="all of them are special"):
        mask_tokens(text(1), seed=0, step=0, mask_token=3, ordinary=2, special=[0, 1])


def test_the_loss_counts_hidden_tokens_only():
    logits = torch.randn(2, 6, 9)
    targets = torch.tensor([[-100, 3, -100, -100, 8, -100], [-100] * 6])
    nats, count = masked_lm_loss(logits, targets)
    expected = F.cross_entropy(logits[0, [1, 4]], targets[0, [1, 4]], reduction="sum")
    torch.testing.assert_close(nats, expected)
    assert count.item() == 2
    with pytest.raises(ValueError, match="masked_lm_loss: expected targets of shape"):
        masked_lm_loss(logits, targets[:1])
