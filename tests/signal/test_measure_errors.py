"""Bad input: one clear line each, before anything runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn as nn

from clearhead.errors import UserError
from clearhead.models.config import PRESETS
from clearhead.models.make import build_model
from clearhead.signal.measurement import measure
from tests.anatomy.hf_models import batch_for, build
from tests.anatomy.test_find import Homemade

TINY = dataclasses.replace(PRESETS["tiny"], width=32, vocab_size=97)
IDS = torch.arange(12).reshape(2, 6)


def broken(value: float) -> nn.Module:
    model = build_model(TINY)
    with torch.no_grad():
        model.blocks[1].attention.key.weight[3, 4] = value  # type: ignore[union-attr]
    return model


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return batch_for(name) | changes


CASES: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "no attention": (lambda: nn.Sequential(nn.Linear(3, 3)), IDS, "no attention found in Sequential"),
    "one token": (lambda: build_model(TINY), IDS[:, :1], "sequences of a single token"),
    "one token, theirs": (lambda: build("gpt2"), {"input_ids": IDS[:, :1]}, "sequences of a single token"),
    "one activation": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 1),
        (torch.randn(2, 1, 32),),
        "sequences of a single token",
    ),
    "one valid token": (
        lambda: build("bert"),
        {"input_ids": IDS, "attention_mask": torch.eye(6, dtype=torch.long)[:2]},
        "no sequence of the encoder has two tokens",
    ),
    "NaN": (
        lambda: broken(float("nan")),
        IDS,
        r"blocks\.1\.attention\.key\.weight holds 1 numbers that are not finite",
    ),
    "infinite": (lambda: broken(float("inf")), IDS, r"blocks\.1\.attention\.key\.weight holds 1 numbers"),
    "vocabulary": (lambda: build_model(TINY), IDS + 90, "the id 101, but the model's vocabulary has 97"),
    "vocabulary, theirs": (lambda: build("llama"), {"input_ids": IDS - 1}, "the id -1, but the model's vocabulary"),
    "empty": (lambda: build_model(TINY), IDS[:0], "the batch is empty"),
    "empty dict": (lambda: build("gpt2"), {}, "the batch is empty"),
    "labels": (
        lambda: build("gpt2"),
        {"input_ids": IDS, "labels": IDS[:, :5]},
        r"labels: expected the shape of the tokens, \(2, 6\), got \(2, 5\)",
    ),
    "labels of a classifier": (
        lambda: build("vit"),
        changed("vit", labels=torch.zeros(7, dtype=torch.long)),
        r"fails on this batch, with labels of shape \(7,\)",
    ),
    "label ids": (lambda: build("bert"), {"input_ids": IDS, "labels": IDS + 95}, "labels holds the id 106"),
    "targets": (
        lambda: build_model(TINY),
        {"tokens": IDS, "targets": IDS[:, 1:]},
        r"targets: expected the tokens' shape \(2, 6\)",
    ),
    "all ignored": (
        lambda: build_model(TINY),
        {"tokens": IDS, "targets": torch.full_like(IDS, -100)},
        "every target is ignored",
    ),
    "floats": (lambda: build_model(TINY), torch.randn(2, 6), "expected token ids"),
    "name": (lambda: build_model(TINY), {"token": IDS}, "unknown name 'token' in the batch; known: source, tokens"),
    "no source": (
        lambda: build_model(dataclasses.replace(TINY, architecture="seq2seq")),
        {"tokens": IDS},
        "lacks 'source'",
    ),
    "no decoder input": (lambda: build("t5"), {"input_ids": IDS}, "needs labels or decoder_input_ids"),
    "type": (lambda: Homemade(), "text", "the batch is empty"),
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_clear_line(case: str) -> None:
    make, batch, message = CASES[case]
    with pytest.raises(UserError, match=message) as caught:
        measure(make(), batch)
    assert "\n" not in str(caught.value)


def test_arguments() -> None:
    model = Homemade()
    with pytest.raises(UserError, match=r"unknown tap 'inputs' \(did you mean 'input'\?\)"):
        measure(model, IDS, taps=("inputs",))
    with pytest.raises(UserError, match=r"rows: expected a whole number of at least 1, got 0"):
        measure(model, IDS, rows=0)
    with pytest.raises(UserError, match=r"must return a tensor of one number"):
        measure(model, IDS, loss=lambda out, _: out)
    with pytest.raises(UserError, match=r"does not depend on the model's parameters"):
        measure(model, IDS, loss=lambda out, _: torch.zeros(()))


def test_a_large_but_finite_weight_is_no_error() -> None:
    """The sum of such a matrix overflows; only its entries decide."""
    model = Homemade()
    with torch.no_grad():
        model.lm_head.weight.fill_(3e38)
    trace = measure(model, IDS, backward=False)
    assert trace.stream("decoder")[0].forward is not None
