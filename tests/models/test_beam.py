"""Beam search: equal to looking at everything, greedy with one beam, no matter how sources are batched."""

from __future__ import annotations

import itertools

import pytest
import torch

from clearhead.models.beam import beam_search

STOP, LIMIT = 3, 4


@pytest.fixture
def model(make_model):
    """Four tokens, of which the last starts and stops; large weights, so that targets differ."""
    made = make_model(architecture="seq2seq", vocab_size=4, attention="softmax", seed=4)
    with torch.no_grad():
        made.decoder.embedding.weight.mul_(2.0)
    return made


def sources(count: int = 5, length: int = 6) -> torch.Tensor:
    return torch.randint(0, 4, (count, length), generator=torch.Generator().manual_seed(3))


def log_probability(model, source, tokens) -> float:
    """log p(tokens | source), each token read from one full pass."""
    read = torch.tensor([[STOP, *tokens[:-1]]])
    with torch.no_grad():
        log_p = model(source[None], read).log_softmax(-1)[0]
    return float(log_p[torch.arange(len(tokens)), torch.tensor(tokens)].sum())


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.5])
def test_wide_enough_it_equals_exhaustive_search(model, alpha):
    for source in sources():
        every = [
            (log_probability(model, source, [*body, STOP]), body)
            for length in range(LIMIT)
            for body in itertools.product(range(STOP), repeat=length)
        ]
        scored = sorted(
            ((log_p / ((5 + len(body) + 1) / 6) ** alpha, log_p, body) for log_p, body in every), reverse=True
        )
        found = beam_search(
            model, source[None], start_token=STOP, stop_token=STOP, max_new_tokens=LIMIT, beams=4**LIMIT,
            length_penalty=alpha,
        )[0]  # fmt: skip
        assert found[0].tokens == scored[0][2]
        assert found[0].score == pytest.approx(scored[0][0], abs=1e-9)
        assert found[0].log_probability == pytest.approx(scored[0][1], abs=1e-9)
        assert found[0].finished
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)


def greedy(model, source, limit) -> list[int]:
    tokens: list[int] = []
    for _ in range(limit):
        with torch.no_grad():
            token = int(model(source[None], torch.tensor([[STOP, *tokens]]))[0, -1].argmax())
        if token == STOP:
            break
        tokens.append(token)
    return tokens


def test_one_beam_is_greedy(model):
    batch = sources(8)
    found = beam_search(model, batch, start_token=STOP, stop_token=STOP, max_new_tokens=7, beams=1)
    lengths = set()
    for source, (hypothesis,) in zip(batch, found, strict=True):
        assert list(hypothesis.tokens) == greedy(model, source, 7)
        lengths.add(len(hypothesis.tokens))
    assert len(lengths) > 1  # otherwise the batch never shrank


@pytest.mark.parametrize("beams", [1, 2, 3])
def test_a_batch_of_padded_sources_equals_each_alone(model, beams):
    batch, lengths = sources(6), torch.tensor([6, 2, 5, 1, 3, 6])
    valid = torch.arange(6) < lengths[:, None]
    options = {"start_token": STOP, "stop_token": STOP, "max_new_tokens": 6, "beams": beams}
    together = beam_search(model, batch, source_valid=valid, **options)
    for row, length in enumerate(lengths.tolist()):
        alone = beam_search(model, batch[row : row + 1, :length], **options)[0]
        assert [h.tokens for h in together[row]] == [h.tokens for h in alone]
        assert [h.score for h in together[row]] == pytest.approx([h.score for h in alone], abs=1e-9)


def test_more_beams_are_never_worse_than_greedy_here_and_stopping_early_changes_nothing(model):
    """The best score is a true score of its tokens, and with alpha = 0 greedy's target cannot beat it by being cut."""
    batch = sources(8)
    options = {"start_token": STOP, "stop_token": STOP, "max_new_tokens": 6, "length_penalty": 0.0}
    one, many = beam_search(model, batch, beams=1, **options), beam_search(model, batch, beams=16, **options)
    for source, (first,), found in zip(batch, one, many, strict=True):
        best = found[0]
        if best.finished:
            assert log_probability(model, source, [*best.tokens, STOP]) == pytest.approx(best.log_probability, abs=1e-9)
        if first.finished:
            assert best.score >= first.score - 1e-9


def test_what_never_ends_is_cut_and_says_so(make_model):
    model = make_model(architecture="seq2seq", vocab_size=6)
    found = beam_search(model, sources(2), start_token=5, stop_token=5, max_new_tokens=3, beams=2, vocabulary=5)
    for hypotheses in found:
        assert len(hypotheses) == 2
        assert all(not h.finished and len(h.tokens) == 3 and max(h.tokens) < 5 for h in hypotheses)


def test_mode_and_arguments(model):
    model.train()
    beam_search(model, sources(1), start_token=STOP, stop_token=STOP, max_new_tokens=1)
    assert model.training
    for wrong in ({"beams": 0}, {"max_new_tokens": 0}, {"length_penalty": -1.0}):
        options = {"start_token": STOP, "stop_token": STOP, "max_new_tokens": 3} | wrong
        with pytest.raises(ValueError, match="beam_search: expected beams and max_new_tokens of at least 1"):
            beam_search(model, sources(1), **options)
