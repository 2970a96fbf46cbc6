"""Weights of later segments (M5, M6) and their likelihood given the first one."""

from __future__ import annotations

import math

import pytest
import torch

from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.objectives.bmi.raml import (
    conditional_nats,
    effective_sample_size,
    joined,
    log_importance_weights,
)

LOG_Q = torch.tensor([0.3, 0.21, 0.05, 0.147], dtype=torch.float64).log()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- weights ----


def test_a_constant_score_leaves_one_over_q():
    """M5: w ~ 1 / q, exactly, for any constant, with and without the same constant as baseline."""
    expected = (1 / LOG_Q.exp()) / (1 / LOG_Q.exp()).sum()
    for constant in (0.0, -7.5, 1e4):
        score = torch.full((4,), constant)
        for baseline in (None, score.clone()):
            w = log_importance_weights(score, LOG_Q, temperature=0.7, baseline_b=baseline).exp()
            assert torch.allclose(w, expected, rtol=1e-12, atol=0)


def test_an_endless_temperature_does_the_same():
    flat = log_importance_weights(torch.zeros(4), LOG_Q)
    assert torch.allclose(log_importance_weights(10 * draw(4), LOG_Q, temperature=1e14), flat, atol=1e-11, rtol=0)


def test_a_later_segment_that_is_the_next_one_has_no_gain():
    """M5: later = next for all: scores cancel pair by pair, and equal q give equal weights."""
    score = 5 * draw(4)
    w = log_importance_weights(score, LOG_Q[:1].expand(4), baseline_b=score).exp()
    assert torch.allclose(w, torch.full((4,), 0.25, dtype=torch.float64), atol=1e-15)


def test_weights_are_those_written_out_and_a_factor_on_q_is_nothing():
    score, baseline, q = draw(4), draw(4, seed=1), LOG_Q.exp()
    plain = ((score - baseline) / 0.8).exp() / q
    found = log_importance_weights(score, LOG_Q, temperature=0.8, baseline_b=baseline)
    assert torch.allclose(found.exp(), plain / plain.sum(), rtol=1e-12)
    scaled = log_importance_weights(score, LOG_Q + math.log(0.7), temperature=0.8, baseline_b=baseline)
    assert torch.allclose(found, scaled, atol=1e-12)  # the released code's extra factor (1 - p)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-14)


def test_scores_of_ten_thousand_give_finite_weights_without_gradient():
    score = torch.tensor([1e4, -1e4, 9999.0], requires_grad=True)
    found = log_importance_weights(score, torch.zeros(3))
    assert not found.requires_grad
    assert found.exp().isfinite().all()
    assert found.exp()[1] == 0
    with pytest.raises(ValueError, match="above 0"):
        log_importance_weights(score, torch.zeros(3), temperature=0.0)


def test_effective_sample_size_rises_with_the_temperature():
    """M6, where q is equal; from one pair to all of them."""
    score = 4 * draw(12)
    sizes = [
        effective_sample_size(log_importance_weights(score, torch.zeros(12), temperature=t)).item()
        for t in (0.01, 0.3, 1.0, 3.0, 10.0, 1e9)
    ]
    assert sizes == sorted(sizes)
    assert sizes[0] == pytest.approx(1.0, abs=1e-6)
    assert sizes[-1] == pytest.approx(12.0, abs=1e-6)
    w = log_importance_weights(score, torch.zeros(12)).exp()
    assert sizes[2] == pytest.approx(1 / (w * w).sum().item())


# ---- likelihood ----


@pytest.fixture(params=["softmax", "laser+selective", "self_adjust"])
def decoder(request):
    config = ModelConfig(vocab_size=11, layers=2, width=16, heads=2, context=16, attention=request.param)
    return build_model(config, 3).double().eval()


FIRST = torch.tensor([[1, 2, 3, 4], [5, 6, 0, 0], [7, 0, 0, 0]])
LATER = torch.tensor([[8, 9, 0], [1, 2, 3], [4, 0, 0]])
FIRST_N, LATER_N = torch.tensor([4, 2, 1]), torch.tensor([2, 3, 1])


def test_every_token_of_later_is_predicted_from_what_stands_before_and_none_of_x(decoder):
    """Row by row without padding, token by token: the first token too."""
    nats, count = conditional_nats(decoder, FIRST, FIRST_N, LATER, LATER_N)
    for row in range(3):
        x, y = FIRST[row, : FIRST_N[row]], LATER[row, : LATER_N[row]]
        log_p = decoder(torch.cat([x, y])[None]).log_softmax(-1)[0]
        expected = -sum(log_p[len(x) - 1 + place, token] for place, token in enumerate(y))
        assert nats[row].item() == pytest.approx(expected.item(), rel=1e-6)  # logits are read in fp32 or better
    assert count.tolist() == [2, 3, 1]
    only_first, _ = conditional_nats(decoder, FIRST[:1], FIRST_N[:1], LATER[:1, :1], torch.tensor([1]))
    assert only_first.item() == pytest.approx(-decoder(FIRST[:1]).log_softmax(-1)[0, -1, 8].item(), rel=1e-6)


def test_padding_of_either_segment_is_never_read(decoder):
    plain, _ = conditional_nats(decoder, FIRST, FIRST_N, LATER, LATER_N)
    first, later = FIRST.clone(), LATER.clone()
    first[1:, 2:] = 10
    later[0, 2:] = 10
    wide_first, wide_later = (torch.nn.functional.pad(t, (0, 5), value=9) for t in (first, later))
    edited, _ = conditional_nats(decoder, wide_first, FIRST_N, wide_later, LATER_N)
    assert torch.equal(plain, edited)


def test_gradients_of_a_padded_batch_are_those_of_its_rows(decoder):
    def gradients(loss):
        decoder.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in decoder.parameters() if p.grad is not None])

    together = gradients(conditional_nats(decoder, FIRST, FIRST_N, LATER, LATER_N)[0].sum())
    alone = sum(
        gradients(
            conditional_nats(
                decoder, FIRST[r : r + 1, : FIRST_N[r]], FIRST_N[r : r + 1], LATER[r : r + 1, : LATER_N[r]],
                LATER_N[r : r + 1],
            )[0].sum()
        )
        for r in range(3)
    )  # fmt: skip
    assert torch.allclose(together, alone, atol=1e-5)


def test_joined_rows_have_no_gap():
    tokens, targets, valid = joined(FIRST, FIRST_N, LATER, LATER_N)
    assert tokens.tolist() == [[1, 2, 3, 4, 8], [5, 6, 1, 2, 0], [7, 0, 0, 0, 0]]
    assert targets.tolist() == [[-100, -100, -100, 8, 9], [-100, 1, 2, 3, -100], [4, -100, -100, -100, -100]]
    assert valid.sum(1).tolist() == [5, 4, 1]


def test_an_encoder_is_refused_with_the_reason():
    model = build_model(ModelConfig(architecture="encoder", vocab_size=11, layers=1, width=16, heads=2, context=16))
    with pytest.raises(UserError, match="no probability"):
        conditional_nats(model, FIRST, FIRST_N, LATER, LATER_N)


def test_an_encoder_decoder_reads_x_as_its_source():
    config = ModelConfig(architecture="seq2seq", vocab_size=11, layers=1, width=16, heads=2, context=16)
    model = build_model(config, 1).double().eval()
    nats, _ = conditional_nats(model, FIRST, FIRST_N, LATER, LATER_N, begin=10)
    for row in range(3):
        x, y = FIRST[row, : FIRST_N[row]], LATER[row, : LATER_N[row]]
        log_p = model(x[None], torch.cat([torch.tensor([10]), y[:-1]])[None]).log_softmax(-1)[0]
        expected = -log_p[torch.arange(len(y)), y].sum().item()
        assert nats[row].item() == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="begin"):
        conditional_nats(model, FIRST, FIRST_N, LATER, LATER_N)
