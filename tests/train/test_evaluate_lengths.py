"""Scores by context length: the same tokens at every length, from windows of exactly that length; what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.train.evaluate import evaluate
from clearhead.train.evaluate_lengths import evaluate_lengths, last_position
from tests.train.test_evaluate import SEPARATOR, Data


def made(**options) -> Decoder:
    model = Decoder(
        ModelConfig(
            vocab_size=11, layers=2, width=16, heads=2, context=8, dropout=0.3, **{"position": "alibi"} | options
        )
    )
    model.init_parameters(1)
    for parameter in model.parameters():  # larger weights, so that predictions depend on the context
        parameter.data.mul_(8)
    return model.train()


@pytest.mark.parametrize("position", ["alibi", "kerple", "fire"])
def test_each_length_by_its_definition(position):
    """Target by target: each block's window alone, and the same targets at each length."""
    model, data, stride = made(position=position), Data(29, 15, 16), 3
    scores = evaluate_lengths(model, data, "test", (16, 4, 8), trained=8, stride=stride)
    assert model.training
    assert scores.lengths == (4, 8, 16)
    assert (scores.documents, scores.left_out) == (2, 1)
    model.eval()
    for result in scores.results:
        nats, tokens = {}, 0
        for document in data.documents("test"):
            ids = torch.from_numpy(document.tokens.astype(np.int64))
            for end in range(16, len(ids), stride):
                with torch.no_grad():
                    logits = model(ids[None, end - result.context : end])[0, -stride:]
                targets = ids[end - stride + 1 : end + 1]
                assert (targets != SEPARATOR).all()
                nats[document.name] = nats.get(document.name, 0.0) + nn.functional.cross_entropy(
                    logits, targets, reduction="sum"
                )
                tokens += stride
        assert result.tokens == tokens == scores.tokens
        assert {d.name: d.nats for d in result.per_document} == pytest.approx({k: float(v) for k, v in nats.items()})
        assert result.bits_per_byte == pytest.approx(float(sum(nats.values())) / math.log(2) / (2 * tokens))
    assert len({round(result.nats, 6) for result in scores.results}) == 3  # the context does change something


def test_a_document_of_one_window_equals_the_plain_evaluation():
    model, data = made(), Data(8)
    scores = evaluate_lengths(model, data, "test", (8,), trained=8, stride=8)
    assert scores.results[0].nats == pytest.approx(evaluate(model, data, "test").nats)


def test_some_of_the_tokens_are_the_same_ones_at_every_length_and_each_time():
    model, data = made(), Data(150, 90, 40)
    scores = evaluate_lengths(model, data, "test", (8, 32), trained=8, max_tokens=60)
    again = evaluate_lengths(model, data, "test", (8, 32), trained=8, max_tokens=60)
    assert scores == again
    assert 55 <= scores.tokens <= 70
    assert len({tuple((d.name, d.tokens, d.bytes) for d in r.per_document) for r in scores.results}) == 1
    told = scores.to_dict()
    assert (told["trained_context"], told["stride"], told["tokens"]) == (8, 4, scores.tokens)
    assert [one["context"] for one in told["lengths"]] == [8, 32]


def test_what_a_window_model_sees_does_not_depend_on_the_length():
    """Two layers of a window of 3 see 5 tokens: lengths beyond that score alike."""
    model, data = made(attention="softmax+window:3"), Data(40)
    scores = evaluate_lengths(model, data, "test", (8, 12, 24), trained=8)
    assert scores.results[1].nats == pytest.approx(scores.results[0].nats, rel=1e-6)
    assert scores.results[2].nats == pytest.approx(scores.results[0].nats, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "lengths", "more", "message"),
    [
        ({"position": "learned"}, (4, 9), {}, "learned positions end at 8"),
        ({}, (), {}, "contexts of at least 2 tokens"),
        ({}, (1, 8), {}, "contexts of at least 2 tokens"),
        ({}, (8, 64), {}, "no document of the test split has 64 tokens (the longest has 29)"),
        ({}, (4, 8), {"stride": 5}, "expected 1 <= stride <= 4"),
    ],
)
def test_refusals_are_one_line(options, lengths, more, message):
    with pytest.raises((UserError, ValueError)) as caught:
        evaluate_lengths(made(**options), Data(29), "test", lengths, trained=8, **more)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_learned_positions_of_hugging_face_end_where_their_table_does():
    transformers = pytest.importorskip("transformers")
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=16)
    )
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=2, vocab_size=20,
                                 intermediate_size=8, max_position_embeddings=16)
    )  # fmt: skip
    assert last_position(gpt2) == 16
    assert last_position(llama) is None
