"""Every task runs through the same loop: exact resume, honest scores, and it learns."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from clearhead.data.config import DataConfig
from clearhead.data.pairs import prepare_pairs
from clearhead.data.text import prepare
from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.io import load_model
from clearhead.models.make import build_model
from clearhead.train import checkpoint as store
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.loop import train
from clearhead.train.score_masked import score_masked
from clearhead.train.score_pairs import score_pairs, translate
from clearhead.train.tasks.task import prepare_task
from clearhead.train.world import World
from tests.train.test_parallel import torchrun

PAIRS = Path(__file__).parents[1] / "data" / "fixtures" / "pairs" / "english-german.tsv"
WORLD = World(0, 1, torch.device("cpu"), "none")


@pytest.fixture
def masked(config):
    def make(**train):
        base = config(**train)
        return dataclasses.replace(
            base, model=dataclasses.replace(base.model, architecture="encoder", position="t5", vocab_size=258)
        )

    return make


@pytest.fixture
def translation():
    def make(*, model=None, tokenizer="bytes", **options):
        train = {"steps": 8, "batch_size": 6, "eval_every": 3, "checkpoint_every": 4, "log_every": 1, "threads": 1}
        return RunConfig(
            model=ModelConfig(
                **{"architecture": "seq2seq", "layers": 1, "width": 16, "heads": 2, "context": 64, "dropout": 0.1}
                | (model or {})
            ),
            data=DataConfig(
                source=str(PAIRS), context=64, val_fraction=0.2, test_fraction=0.2, tokenizer=tokenizer, vocab_size=400
            ),
            optim=OptimConfig(lr=1e-2, warmup_steps=2),
            train=TrainConfig(**train | options),
        )

    return make


def weights(run):
    return (store.newest_model(run) / store.MODEL).read_bytes()


def lines(run):
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in e.items() if "seconds" not in k and "per_second" not in k} for e in events]


# ---- the loop ----


@pytest.mark.parametrize("task", ["masked_lm", "translation"])
def test_stopped_and_gone_on_it_is_the_same_run_bit_by_bit(task, masked, translation, tmp_path):
    make = {"masked_lm": masked, "translation": lambda **t: translation(label_smoothing=0.1, **t)}[task]

    def stop(event):
        if event["kind"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    run, whole = tmp_path / "run", tmp_path / "whole"
    config = make(steps=8, checkpoint_every=0)
    assert train(config, run, on_event=stop, progress=False).status == "interrupted"
    resumed = train(config, run, progress=False)
    straight = train(config, whole, progress=False)
    assert resumed.status == straight.status == "finished"
    assert resumed.summary["starts"] == 2
    assert weights(run) == weights(whole)
    assert lines(run) == lines(whole)
    for result in (resumed, straight):
        assert result.summary["task"] == task
        json.dumps(result.summary, allow_nan=False)
    same = [key for key in straight.summary if key.startswith(("test_", "val_loss"))]
    assert same
    assert all(resumed.summary[key] == straight.summary[key] for key in same)
    assert isinstance(load_model(store.newest_model(run)), type(build_model(config.model)))


@pytest.mark.parametrize("task", ["masked_lm", "translation"])
def test_grad_accum_changes_rounding_only(task, masked, translation, tmp_path):
    make = {"masked_lm": masked, "translation": translation}[task]
    losses = {}
    for accum in (1, 2):
        config = make(grad_accum=accum, steps=4, eval_every=0)
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
        train(config, tmp_path / str(accum), progress=False)
        losses[accum] = [line["loss"] for line in lines(tmp_path / str(accum)) if line["kind"] == "train"]
    assert losses[1] == pytest.approx(losses[2], rel=1e-4)


def test_translation_counts_target_tokens_and_reports_plain_nats(translation, tmp_path):
    result = train(translation(label_smoothing=0.3, steps=3), tmp_path / "run", progress=False)
    plain = train(translation(steps=3), tmp_path / "plain", progress=False)
    first = [
        next(e["loss"] for e in lines(run) if e["kind"] == "train") for run in (tmp_path / "run", tmp_path / "plain")
    ]
    assert first[0] == pytest.approx(first[1])  # the same weights and batch, whatever is minimised
    assert weights(tmp_path / "run") != weights(tmp_path / "plain")
    assert result.summary["tokens"] == result.summary["valid_tokens"] == plain.summary["valid_tokens"]
    assert 0 <= result.summary["test_chrf"] <= 100
    assert result.summary["test_left_out"] == 0
    assert result.summary["val_curve"][-1].keys() >= {"step", "tokens", "loss"}


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("task", ["masked_lm", "translation"])
def test_two_processes_equal_one(task, parallel, masked, translation, tmp_path):
    """Whose rows count unequally many targets; sharded tables that stacks share, and decoding with sharded weights."""

    def make(**options):
        made = {"masked_lm": masked, "translation": translation}[task](batch_size=8, grad_accum=2, steps=4, **options)
        return dataclasses.replace(
            made, model=dataclasses.replace(made.model, dropout=0.0), optim=dataclasses.replace(made.optim, eps=1e-3)
        )

    assert torchrun(tmp_path / "two", make(parallel=parallel), "") == ["finished", "finished"]
    one = train(make(), tmp_path / "one", progress=False).summary
    two = json.loads((tmp_path / "two" / "result.json").read_text())["summary"]
    assert two["processes"] == 2
    assert two["valid_tokens"] == one["valid_tokens"]
    assert two["test_nats_per_token"] == pytest.approx(one["test_nats_per_token"], rel=1e-4)
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


# ---- batches and scores ----


def test_masked_batches_hide_what_the_text_says(masked):
    config = masked(batch_size=8)
    task = prepare_task(config)
    (batch,), valid = task.read(3, WORLD)
    original = task.data.batch("train", 8, 32, 0, 3)
    chosen = batch.targets_bt != -100
    assert valid == int(chosen.sum()) == sum(round(0.15 * (row != 256).sum()) for row in original.tokens)
    assert torch.equal(batch.targets_bt[chosen], torch.from_numpy(original.tokens)[chosen])
    assert torch.equal(batch.tokens_bt[~chosen], torch.from_numpy(original.tokens)[~chosen])
    assert (batch.tokens_bt == 257).sum() > 0.5 * chosen.sum()
    again = task.read(3, WORLD)[0][0]
    assert torch.equal(again.tokens_bt, batch.tokens_bt)


def test_every_token_of_a_document_can_be_hidden_once_and_batches_change_nothing(masked):
    config = masked()
    data = prepare(config.data)
    model = build_model(config.model, 5).eval()
    options = {"tokenizer": data.tokenizer, "mask_token": 257}
    every = score_masked(model, data, "test", fraction=1.0, **options)
    assert every.tokens == sum(document.bytes for document in data.documents("test"))
    one, many = (score_masked(model, data, "test", batch_size=size, **options) for size in (1, 7))
    assert one.tokens == many.tokens
    assert one.nats == pytest.approx(many.nats, rel=1e-6)
    assert one.tokens == pytest.approx(0.15 * every.tokens, rel=0.1)
    assert one.nats_per_token == pytest.approx(math.log(258), abs=0.3)  # it knows nothing yet
    part = score_masked(model, data, "test", max_tokens=300, **options)
    assert part.tokens < one.tokens
    assert len(part.per_document) == len(one.per_document)


def test_a_model_that_peeks_is_right_about_what_stayed_and_nothing_more(masked):
    """A 'model' that repeats its input finds the tokens that were left as they are: 10 % of the hidden ones."""

    class Repeats(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens, valid=None):
            return 5.0 * torch.nn.functional.one_hot(tokens, 258).float()

    data = prepare(masked().data)
    found = score_masked(Repeats(), data, "train", tokenizer=data.tokenizer, mask_token=257)
    assert found.accuracy == pytest.approx(0.1, abs=0.03)


def test_nats_of_pairs_do_not_depend_on_batches_or_padding(translation):
    config = translation()
    data = prepare_pairs(config.data)
    model = build_model(config.model, 5).double().eval()
    separator = data.tokenizer.separator
    expected = 0.0
    for source, target in data.pairs("val"):
        read = torch.tensor([[separator, *target]])
        logits = model(torch.tensor([[*source, separator]]), read)
        expected += torch.nn.functional.cross_entropy(
            logits[0].float(), torch.tensor([*target, separator]), reduction="sum"
        ).item()
    for size in (1, 3, 100):
        found = score_pairs(model, data, "val", batch_size=size, beams=None)
        assert found.nats == pytest.approx(expected, rel=1e-6)
        assert found.tokens == sum(len(target) + 1 for _, target in data.pairs("val"))
    part = score_pairs(model, data, "val", beams=None, max_tokens=60)
    assert 0 < part.pairs < found.pairs


# ---- learning ----


def test_a_handful_of_pairs_is_learnt_by_heart(translation, tmp_path):
    """The whole way: data, loop, checkpoint, cached beam search, sacrebleu. BLEU 100 on what it was trained on."""
    model = {"width": 64, "heads": 4, "dropout": 0.0, "init": "xavier", "vocab_size": 400}
    config = translation(steps=70, batch_size=25, eval_every=0, checkpoint_every=0, model=model, tokenizer="bpe")
    config = dataclasses.replace(config, optim=OptimConfig(lr=4e-3, warmup_steps=10, weight_decay=0.0))
    train(config, tmp_path / "run", progress=False)
    model = load_model(store.newest_model(tmp_path / "run"))
    data = prepare_pairs(config.data)
    for beams in (1, 3):
        found = score_pairs(model, data, "train", beams=beams)
        assert found.bleu == pytest.approx(100.0)
        assert found.chrf == pytest.approx(100.0)
    untold = score_pairs(model, data, "test", beams=1)
    assert untold.bleu < 60  # it learnt by heart, and the test pairs were not among it
    text = translate(model, data.tokenizer, [data.pairs("train")[3][0]], limit=64)[0]
    assert text == data.tokenizer.decode(data.pairs("train")[3][1])


def test_an_encoder_learns_to_fill_in(masked, tmp_path):
    """Words of a small vocabulary: nats fall well below those of the byte frequencies alone."""
    config = masked(steps=150, batch_size=8, eval_every=0, checkpoint_every=0)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model, layers=2, width=64, heads=4, dropout=0.0, attention="softmax", position="rope", init="xavier"
        ),
        optim=OptimConfig(lr=8e-3, warmup_steps=10),
    )
    summary = train(config, tmp_path / "run", progress=False).summary
    stream = np.concatenate([document.tokens[1:] for document in prepare(config.data).documents("train")])
    share = np.bincount(stream) / stream.size
    unigram = -(share[share > 0] * np.log(share[share > 0])).sum()
    assert summary["test_nats_per_token"] < unigram - 0.2
    assert summary["test_accuracy"] > 1.3 * share.max()


# ---- the config ----


def test_the_task_follows_from_the_architecture_and_is_checked(masked, translation):
    assert masked().task == "masked_lm"
    assert translation().task == "translation"
    values = translation().to_dict()
    assert RunConfig.from_dict(values | {"task": "translation"}) == translation()
    with pytest.raises(UserError, match=r"task=masked_lm needs model\.architecture=encoder, got seq2seq"):
        RunConfig.from_dict(values | {"task": "masked_lm"})
    with pytest.raises(UserError, match="did you mean 'translation'"):
        RunConfig.from_dict(values | {"task": "translatoin"})


def test_options_of_another_task_are_refused(config, masked, translation):
    with pytest.raises(UserError, match=r"train.label_smoothing is for translation; this run is causal_lm"):
        config(label_smoothing=0.1)
    with pytest.raises(UserError, match=r"train.mask_fraction is for masked_lm; this run is translation"):
        translation(mask_fraction=0.3)
    with pytest.raises(UserError, match=r"translation counts steps"):
        translation(steps=None, tokens=1000)
    with pytest.raises(UserError, match=r"which has 258 ids, the mask included; set model.vocab_size=258"):
        dataclasses.replace(masked(), model=dataclasses.replace(masked().model, vocab_size=257))


def test_without_sacrebleu_a_translation_is_refused_before_it_begins(translation, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sacrebleu", None)
    with pytest.raises(UserError, match=r"pip install 'clearhead\[translation\]'"):
        train(translation(), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "config.json").exists()
