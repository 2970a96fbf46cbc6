"""Decoding with a cache equals the full forward, however the tokens are cut and padded."""

from __future__ import annotations

import pytest
import torch
from decoder_cases import TOLERANCE, every_case

from clearhead.models.state import DecoderState


@every_case
@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 5, 6], [20]], ids=["by token", "in chunks", "at once"])
@torch.no_grad()
def test_cached_equals_full(make_model, tokens, case, cuts):
    model = make_model(**case)
    state = model.new_state(3, 24)
    decoded = torch.cat([model(part, state=state) for part in tokens.split(cuts, dim=1)], dim=1)
    torch.testing.assert_close(decoded, model(tokens), **TOLERANCE)
    assert state.lengths.tolist() == [20, 20, 20]


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_prompts_of_unequal_length_decode_as_each_alone(make_model, tokens, case, side):
    model = make_model(**case)
    lengths = [12, 5, 1]
    prompt = torch.randint(0, 31, (3, 12), generator=torch.Generator().manual_seed(5))
    valid = torch.zeros(3, 12, dtype=torch.bool)
    for row, length in enumerate(lengths):
        place = slice(12 - length, 12) if side == "left" else slice(0, length)
        prompt[row, place] = tokens[row, :length]
        valid[row, place] = True
    state = model.new_state(3, 20)
    # The prompt in two chunks: the short rows' padding spans the first one.
    model(prompt[:, :6], valid=valid[:, :6], state=state)
    model(prompt[:, 6:], valid=valid[:, 6:], state=state)
    assert state.lengths.tolist() == lengths
    new = torch.stack([tokens[row, length : length + 4] for row, length in enumerate(lengths)])
    decoded = torch.cat([model(part, state=state) for part in new.split([1, 1, 2], dim=1)], dim=1)
    for row, length in enumerate(lengths):
        alone = model(tokens[row : row + 1, : length + 4])[0, length:]
        torch.testing.assert_close(decoded[row], alone, **TOLERANCE)


def state_after(model, tokens) -> DecoderState:
    state = model.new_state(tokens.shape[0], 20)
    model(tokens, state=state)
    return state


@pytest.mark.parametrize("attention", ["softmax+selective", "self_adjust+window:4"])
@torch.no_grad()
def test_state_can_be_cropped_reordered_and_reset(make_model, tokens, attention):
    model = make_model(attention=attention)
    following = tokens[:, 10:14]

    state = state_after(model, tokens[:, :14])
    state.crop(10)
    torch.testing.assert_close(model(following, state=state), model(tokens[:, :14])[:, 10:], **TOLERANCE)

    state = state_after(model, tokens[:, :10])
    state.reorder(torch.tensor([2, 0, 0]))
    expected = model(torch.cat((tokens[[2, 0, 0], :10], following), dim=1))[:, 10:]
    torch.testing.assert_close(model(following, state=state), expected, **TOLERANCE)

    state = state_after(model, tokens[:, :10])
    state.reset(torch.tensor([False, True, False]))
    out = model(following, state=state)
    torch.testing.assert_close(out[1], model(following)[1], **TOLERANCE)
    torch.testing.assert_close(out[0], model(tokens[:, :14])[0, 10:], **TOLERANCE)


def test_a_cache_refuses_gradients_and_overflow(make_model, tokens):
    model = make_model()
    with pytest.raises(ValueError, match="no gradients"):
        model(tokens, state=model.new_state(3, 20))
    with torch.no_grad(), pytest.raises(ValueError, match="full"):
        model(tokens, state=model.new_state(3, 19))
