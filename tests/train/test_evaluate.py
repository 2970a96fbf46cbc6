from __future__ import annotations

import math
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.train.evaluate import Interrupted, choose_windows, evaluate, windows

SEPARATOR = 10


@dataclass
class Document:
    name: str
    tokens: np.ndarray
    bytes: int


class Data:
    """Documents of the given lengths, ten letters and a separator; each token stands for two bytes."""

    def __init__(self, *lengths: int, context: int = 8) -> None:
        self.config = SimpleNamespace(context=context)
        draw = np.random.default_rng(5)
        self._documents = [
            Document(str(n), np.concatenate([[SEPARATOR], draw.integers(0, 10, n)]).astype(np.uint16), 2 * n)
            for n in lengths
        ]

    def documents(self, split: str) -> list[Document]:
        return self._documents


@pytest.fixture
def model():
    made = Decoder(ModelConfig(vocab_size=11, layers=2, width=16, heads=2, context=8, dropout=0.3, position="alibi"))
    made.init_parameters(1)
    for parameter in made.parameters():  # larger weights, so that predictions depend on the context
        parameter.data.mul_(8)
    return made.train()


@pytest.mark.parametrize("inputs", [1, 2, 7, 8, 9, 12, 13, 16, 17, 50])
@pytest.mark.parametrize(("context", "stride"), [(8, 4), (8, 8), (8, 1), (8, 3), (1, 1)])
def test_every_token_is_scored_once_with_enough_context(inputs, context, stride):
    made = windows(0, inputs, context, stride)
    scored = [target for window in made for target in range(window.score_from, window.end)]
    assert scored == list(range(inputs))
    for window in made:
        assert window.end - window.start <= context
        for target in range(window.score_from, window.end):  # target i is predicted from inputs start..i
            assert target - window.start + 1 >= min(target + 1, context - stride + 1)


def test_a_document_that_fits_equals_one_forward_pass(model):
    data = Data(8)
    result = evaluate(model, data, "test")
    tokens = torch.from_numpy(data.documents("test")[0].tokens.astype(np.int64))
    with torch.no_grad():
        logits = model.eval()(tokens[None, :-1])[0]
    nats = nn.functional.cross_entropy(logits, tokens[1:], reduction="sum").item()
    assert result.nats == pytest.approx(nats, rel=1e-6)
    assert result.tokens == 8  # the first letter too, and never the separator
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / 16, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(nats / 8), rel=1e-6)


def test_a_long_document_token_by_token(model):
    """Against the definition: each target from its own window, one forward pass at a time."""
    data, context, stride = Data(29), 8, 3
    tokens = torch.from_numpy(data.documents("test")[0].tokens.astype(np.int64))
    model.eval()
    nats = 0.0
    for target in range(29):
        first_end = context
        while first_end <= target:  # the first window that reaches this target
            first_end = min(first_end + stride, 29)
        start = max(first_end - context, 0)
        with torch.no_grad():
            log_p = model(tokens[None, start : target + 1])[0, -1].log_softmax(-1)
        nats -= log_p[tokens[target + 1]].item()
    assert evaluate(model, data, "test", stride=stride).nats == pytest.approx(nats, rel=1e-5)


def test_batch_size_changes_nothing(model):
    data = Data(3, 40, 8, 25, 1)
    results = [evaluate(model, data, "test", batch_size=size) for size in (1, 2, 5, 64)]
    for result in results[1:]:
        assert [d.name for d in result.per_document] == [d.name for d in results[0].per_document]
        for a, b in zip(result.per_document, results[0].per_document, strict=True):
            assert (a.tokens, a.bytes) == (b.tokens, b.bytes)
            assert a.nats == pytest.approx(b.nats, rel=1e-5)


def test_totals_are_those_of_the_documents(model):
    result = evaluate(model, Data(3, 40, 8), "test")
    assert result.tokens == 51
    assert result.bytes == 102
    assert result.nats == pytest.approx(sum(document.nats for document in result.per_document))
    assert [document.tokens for document in result.per_document] == [3, 40, 8]


def test_more_context_is_used_when_the_stride_is_smaller(model):
    """The numbers differ, so the stride is really obeyed."""
    data = Data(60)
    assert evaluate(model, data, "test", stride=8).nats != evaluate(model, data, "test", stride=1).nats


def test_a_budget_scores_a_fixed_even_sample(model):
    data = Data(400, 100, context=8)
    result = evaluate(model, data, "val", max_tokens=100)
    assert 90 <= result.tokens <= 110
    assert result.bytes == pytest.approx(2 * result.tokens)
    shares = {document.name: document.tokens / result.tokens for document in result.per_document}
    assert shares["400"] == pytest.approx(0.8, abs=0.1)
    assert evaluate(model, data, "val", max_tokens=100).nats == result.nats
    every = choose_windows([400, 100], 8, 4, None)
    some = choose_windows([400, 100], 8, 4, 100)
    assert set(some) < set(every)


def test_training_mode_comes_back_and_dropout_is_off(model):
    assert evaluate(model, Data(20), "val").nats == evaluate(model, Data(20), "val").nats
    assert model.training
    model.eval()
    evaluate(model, Data(20), "val")
    assert not model.training


def test_stopping_in_between(model):
    answers = iter([False, False, True])
    with pytest.raises(Interrupted):
        evaluate(model, Data(200), "val", batch_size=2, should_stop=lambda: next(answers))
    assert model.training


def test_bad_arguments(model):
    with pytest.raises(UserError, match="the test split has no text"):
        evaluate(model, Data(), "test")
    with pytest.raises(ValueError, match="1 <= stride <= context=8"):
        evaluate(model, Data(9), "test", stride=9)
    with pytest.raises(ValueError, match="max_tokens >= 1"):
        evaluate(model, Data(9), "test", max_tokens=0)
