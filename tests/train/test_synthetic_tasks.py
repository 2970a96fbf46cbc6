"""Generated tasks in training: only answers count, scores are right, runs resume, other lengths are scored."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from clearhead import cli
from clearhead.data.config import DataConfig
from clearhead.data.synthetic.source import SyntheticData
from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.models.make import build_model
from clearhead.train.config import RunConfig, TrainConfig
from clearhead.train.loop import train
from clearhead.train.score_answers import band_ends, score_answers
from clearhead.train.tasks.task import prepare_task
from clearhead.train.world import World
from tests.train.test_loop import losses, weights

WORLD = World(0, 1, torch.device("cpu"), "none")


def run_config(source="needle", *, context=32, model=None, **options):
    values = {"layers": 1, "width": 16, "heads": 2, "vocab_size": 80, "context": context} | (model or {})
    values["context"] = context
    start = {"steps": 8, "batch_size": 4, "eval_every": 3, "checkpoint_every": 4, "log_every": 1, "threads": 1}
    return RunConfig(
        model=ModelConfig(**values),
        data=DataConfig(source=f"synthetic:{source}", context=context),
        optim=dataclasses.replace(RunConfig(train=TrainConfig(steps=1)).optim, warmup_steps=0),
        train=TrainConfig(**(start | options)),
    )


class Guess(torch.nn.Module):
    """Says the same everywhere: a stated score for each symbol, whatever it reads."""

    def __init__(self, scores):
        super().__init__()
        self.scores = torch.nn.Parameter(torch.as_tensor(scores, dtype=torch.float32))

    def forward(self, tokens, **_):
        return self.scores.expand(*tokens.shape, -1)


@pytest.mark.parametrize("architecture", ["decoder", "encoder"])
def test_only_answers_count(architecture):
    source = "copy" if architecture == "encoder" else "recall,pairs=4,keys=8,values=8"
    config = run_config(source, model={"architecture": architecture}, grad_accum=2)
    task = prepare_task(config)
    model = build_model(config.model, 0)
    batches, valid = task.read(5, WORLD)
    assert valid == sum(int((b.targets_bt != -100).sum()) for b in batches)
    nats = sum(batch.loss(model)[0].item() for batch in batches)
    by_hand = 0.0
    for batch in batches:
        log_p = model(batch.tokens_bt).double().log_softmax(-1)
        for row, position in (batch.targets_bt != -100).nonzero().tolist():
            by_hand -= log_p[row, position, batch.targets_bt[row, position]].item()
    assert nats == pytest.approx(by_hand, rel=1e-5)


def test_batches_are_a_function_of_the_step_whatever_the_processes():
    config = run_config(batch_size=8, grad_accum=2)
    task = prepare_task(config)
    whole = task.data.batch("train", 8, 32, 0, 3)
    rows = []
    for index in range(2):
        for rank in range(2):
            rows.append(task.read(3, World(rank, 2, torch.device("cpu"), "none"))[0][index].tokens_bt)
    assert np.array_equal(torch.cat(rows).numpy(), whole.tokens)


def test_a_guess_scores_what_it_should():
    data = SyntheticData(DataConfig(source="synthetic:needle,values=4,sequences=50", context=40))
    scores = np.full(data.vocab_size, -30.0)
    values = [i for i, s in enumerate(data.tokenizer.symbols) if s[0] == "v"]
    scores[values] = [1.0, 0.0, 0.0, 0.0]
    guess = Guess(scores)
    results = [score_answers(guess, data, "val", both_ways=False, batch_size=size) for size in (1, 7, 50)]
    result = results[0]
    for other in results[1:]:  # however many at a time
        assert [(b.low, b.answers, b.right) for b in other.bands] == [(b.low, b.answers, b.right) for b in result.bands]
        assert other.nats == pytest.approx(result.nats, rel=1e-6)
    answers = [data.sample("val", i).targets.max() for i in range(50)]
    first = sum(a == values[0] for a in answers)
    assert result.answers == 50
    assert result.accuracy == first / 50
    log_z = math.log(math.e + 3)
    assert result.nats_per_answer == pytest.approx(log_z - first / 50, rel=1e-5)
    assert result.bits_per_answer == pytest.approx(result.nats_per_answer / math.log(2))
    far = [int(data.sample("val", i).distance.max()) for i in range(50)]
    for band in result.bands:
        assert band.answers == sum(band.low <= d <= band.high for d in far)
    assert guess.training
    few = score_answers(guess, data, "val", both_ways=False, max_tokens=401)
    assert (few.sequences, few.answers) == (10, 10)
    one = score_answers(guess, data, "val", both_ways=False, context=4000, max_tokens=1)
    assert (one.sequences, one.context) == (1, 4000)


def test_bands_hold_every_distance():
    for length in (1, 4, 5, 64, 1000):
        ends = band_ends(length)
        assert ends[0] == 3
        assert ends[-1] >= length - 1
        assert all(b == 2 * a + 1 for a, b in pairwise(ends))


def test_a_stopped_run_goes_on_bit_for_bit(tmp_path):
    config = run_config("two-step,sequences=16", model={"dropout": 0.1})

    def stop(event):
        if event["kind"] == "step" and event["step"] == 6:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        train(config, tmp_path / "run", on_event=stop, progress=False)
    train(config, tmp_path / "run", progress=False)
    train(config, tmp_path / "whole", progress=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_stopped_run_with_a_memory_goes_on_bit_for_bit(tmp_path):
    config = run_config(
        "state,length=64,sequences=8", context=16, model={"position": "xl", "memory": "lengths:20", "layers": 1}
    )

    def stop(event):
        if event["kind"] == "step" and event["step"] == 6:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        train(config, tmp_path / "run", on_event=stop, progress=False)
    train(config, tmp_path / "run", progress=False)
    whole = train(config, tmp_path / "whole", progress=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert whole.summary["test_answers"] > 0


def test_segments_through_a_full_memory_score_as_the_whole_sequence():
    model = Decoder(
        ModelConfig(layers=1, width=16, heads=2, vocab_size=60, context=16, position="xl", memory="full:64")
    ).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    data = SyntheticData(DataConfig(source="synthetic:two-step,length=64,sequences=6", context=16))
    parts = score_answers(model, data, "val", both_ways=False, segment=16, batch_size=4)
    other = score_answers(model, data, "val", both_ways=False, segment=8, layout="full:64", batch_size=4)
    whole = score_answers(model, data, "val", both_ways=False)
    blind = score_answers(model, data, "val", both_ways=False, segment=16, layout="full:0")
    for result in (parts, other):
        assert result.answers == whole.answers
        assert result.nats == pytest.approx(whole.nats, rel=1e-6)  # logits are compared in float32
    assert abs(blind.nats - whole.nats) > 1e-3


def test_a_feedback_model_that_carries_its_memory_scores_as_in_one_go(tmp_path):
    options = {"architecture": "feedback", "feedback_carry": True, "feedback_window": 8, "position": "relative_key"}
    config = run_config("state,length=32,sequences=4", context=8, model=options, steps=3)
    result = train(config, tmp_path / "run", progress=False).summary
    assert result["test_answers"] > 0
    model = build_model(config.model, 0).double()
    data = SyntheticData(config.data)
    parts = score_answers(model, data, "val", both_ways=False, segment=8)
    whole = score_answers(model, data, "val", both_ways=False)
    assert parts.nats == pytest.approx(whole.nats, rel=1e-6)
    assert parts.answers == whole.answers


def test_a_longer_sequence_than_the_context_needs_a_memory():
    with pytest.raises(UserError, match=r"needs a memory"):
        prepare_task(run_config("state,length=64", context=16))


def test_it_learns(tmp_path):
    """Close to a set the share of right answers rises far above a guess."""
    config = run_config(
        "state,states=2,sets=0.5", context=16, steps=150, batch_size=16, eval_every=0, checkpoint_every=0
    )
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e-2))
    result = train(config, tmp_path / "run", progress=False)
    near = result.summary["test_by_distance"][0]
    assert near["accuracy"] > 0.7  # a guess: 0.5


def test_refusals():
    with pytest.raises(UserError, match=r"is for causal_lm and masked_lm; this run is translation"):
        run_config("needle", model={"architecture": "seq2seq"})
    with pytest.raises(UserError, match=r"train.mask_fraction: a generated task"):
        run_config("copy", model={"architecture": "encoder"}, mask_fraction=0.3)
    with pytest.raises(UserError, match=r"too small for .* which has"):
        run_config("needle", model={"vocab_size": 20})


# ---- from the command line ----

QUICK = ["--model", "tiny", "--model.width", "16", "--model.layers", "1", "--steps", "2", "--train.threads", "1"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    cases = {
        "needle": ["--data", "synthetic:needle,sequences=4", "--context", "48"],
        "learned": ["--data", "synthetic:needle,sequences=4", "--context", "48", "--model.position", "learned"],
        "masked": ["--data", "synthetic:copy,sequences=4", "--context", "48", "--task", "masked_lm"],
        "memory": ["--data", "synthetic:two-step,sequences=4,length=64", "--memory", "full:64", "--segment", "16"],
        "feedback": ["--data", "synthetic:state,sequences=4", "--context", "16", "--model.architecture", "feedback"],
    }
    for name, options in cases.items():
        assert cli.main(["train", "--out", str(folder / name), *options, *QUICK]) == 0
    return folder


def scored(capsys, *arguments):
    assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_trained_and_scored(runs, capsys):
    for name, answers in (("needle", 4), ("masked", 4 * 23), ("feedback", None), ("memory", None)):
        found = scored(capsys, runs / name)
        result = json.loads((runs / name / "result.json").read_text())["summary"]
        assert found["bits_per_answer"] == pytest.approx(result["test_bits_per_answer"], rel=1e-5)
        assert found["accuracy"] == result["test_accuracy"]
        assert found["answers"] == result["test_answers"] == (answers or found["answers"]) > 0
        assert result["val_bits_per_answer"] == result["val_curve"][-1]["bits_per_answer"]
        assert "test_bits_per_byte" not in result
    assert cli.main(["evaluate", str(runs / "needle")]) == 0
    shown = capsys.readouterr().out
    assert "tokens back" in shown
    assert "4 sequences of 48 tokens" in shown


def test_other_lengths_than_in_training(runs, capsys):
    assert scored(capsys, runs / "needle", "--context", 200)["context"] == 200
    assert scored(capsys, runs / "masked", "--context", 96)["answers"] == 4 * 47
    more = scored(capsys, runs / "needle", "--context", 300, "--data", "synthetic:needle,facts=9,asks=9,sequences=2")
    assert (more["context"], more["answers"]) == (300, 18)  # 9 facts fit into 300 tokens, though not into 48
    longer = scored(
        capsys, runs / "memory", "--memory", "full:128", "--data", "synthetic:two-step,length=128,sequences=2"
    )
    assert longer["context"] == 128


@pytest.mark.parametrize(
    ("run", "arguments", "words"),
    [
        ("learned", ["--context", "64"], "learned positions end at context=48"),
        ("needle", ["--data", "synthetic:needle,values=3"], "other symbols than the run's"),
        (
            "needle",
            ["--data", "shakespeare"],
            "trained on a generated task; other data for it must be",
        ),
        ("needle", ["--split", "all"], "a generated task has no end"),
        ("needle", ["--stride", "3"], "--stride means nothing"),
        ("needle", ["--context", "2"], "needs at least"),
        ("needle", ["--data", "synthetic:needle,length=96"], "which needs a memory"),
    ],
)
def test_what_cannot_be_scored_is_refused(runs, capsys, monkeypatch, run, arguments, words):
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["evaluate", str(runs / run), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_data_list_names_the_tasks(capsys):
    assert cli.main(["data", "list"]) == 0
    assert "synthetic:two-step,sequences=256" in capsys.readouterr().out


def test_the_rest_of_the_commands(runs, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(runs)
    assert cli.main(["generate", "needle", "--prompt", "k1 v1"]) == 2
    assert "answers questions of a generated task and writes nothing" in capsys.readouterr().err
    assert cli.main(["inspect", "--model", "needle", "--json"]) == 0
    assert "tokens of synthetic:needle" in capsys.readouterr().out
