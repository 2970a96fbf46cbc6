"""BMI in training: the same loop, exact resume, the critic in checkpoints, its terms in the log, honest costs."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import warnings

import pytest
import torch

from clearhead import cli
from clearhead.compare.arms import Arm
from clearhead.compare.costs import resolve
from clearhead.compare.plan import ComparePlan
from clearhead.errors import UserError
from clearhead.models.io import load_model
from clearhead.models.make import build_model
from clearhead.objectives.config import RECIPES, ObjectiveConfig
from clearhead.train import checkpoint as store
from clearhead.train.config import RunConfig
from clearhead.train.loop import train
from clearhead.train.tasks.segments import make_critic, stored_critic
from clearhead.train.tasks.task import prepare_task
from clearhead.train.world import World

WORLD = World(0, 1, torch.device("cpu"), "none")
SHORT = {"segments": "chunk:16", "pairs": 6, "critic_hidden": 8}


@pytest.fixture
def bmi(config):
    """A tiny run with an objective; `model` and options of the loop by keyword."""

    def make(objective, **options):
        base = config(**options)
        return dataclasses.replace(base, objective=ObjectiveConfig(**SHORT | objective))

    return make


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    return tmp_path_factory.mktemp("base")


@pytest.fixture
def base_run(bmi, started):
    """A finished run of BMI-base, made once."""
    train(bmi({"nsp": 0.1}, steps=6), started / "run", progress=False)
    return started / "run"


def lines(run, kind=None):
    events = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in e.items() if "seconds" not in k and "per_second" not in k}
        for e in events
        if kind in (None, e["kind"])
    ]


def files(run):
    folder = store.newest_model(run)
    names = (store.MODEL, store.OPTIMIZER, store.COMPANION, store.COMPANION_OPTIMIZER)
    return {name: (folder / name).read_bytes() for name in names if (folder / name).exists()}


def stop_at(step):
    def stop(event):
        if event["kind"] == "step" and event["step"] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


# ---- resuming ----


@pytest.mark.parametrize("phase", ["base", "full"])
@pytest.mark.filterwarnings("ignore:step .*effective sample size:UserWarning")
def test_stopped_and_gone_on_it_is_the_same_run_bit_by_bit(phase, bmi, base_run, tmp_path):
    """Model, critic, both parts of the optimizer, and every line of the log, the mean of a half-read window too."""
    objective = {"nsp": 0.1} | ({"raml": 0.2, "start": str(base_run)} if phase == "full" else {})
    made = bmi(objective, steps=9, checkpoint_every=0, log_every=4)
    run, whole = tmp_path / "run", tmp_path / "whole"
    assert train(made, run, on_event=stop_at(6), progress=False).status == "interrupted"
    resumed = train(made, run, progress=False)
    straight = train(made, whole, progress=False)
    assert resumed.status == straight.status == "finished"
    assert resumed.summary["starts"] == 2
    assert files(run) == files(whole)
    assert len(files(run)) == 4
    assert lines(run) == lines(whole)
    for key in ("test_nsp", "test_nsp_accuracy", "test_nats_per_token"):
        assert resumed.summary[key] == straight.summary[key]


# ---- what is learned and what is left alone ----


def test_a_critic_that_only_looks_on_leaves_the_model_as_it_is(bmi, config, tmp_path):
    """nsp_trains=critic is the plain run, bit by bit, dropout and clipping included; with the encoder it is another."""
    plain = train(config(steps=6, eval_every=0), tmp_path / "plain", progress=False)
    looks = train(bmi({"nsp": 0.5, "nsp_trains": "critic"}, steps=6, eval_every=0), tmp_path / "looks", progress=False)
    learns = train(bmi({"nsp": 0.5}, steps=6, eval_every=0), tmp_path / "learns", progress=False)
    assert files(tmp_path / "plain")[store.MODEL] == files(tmp_path / "looks")[store.MODEL]
    assert files(tmp_path / "plain")[store.MODEL] != files(tmp_path / "learns")[store.MODEL]
    assert plain.summary["test_nats_per_token"] == looks.summary["test_nats_per_token"]
    assert plain.summary["tokens"] == learns.summary["tokens"]
    first = [lines(tmp_path / name, "train")[0] for name in ("plain", "looks", "learns")]
    assert first[0]["loss"] == first[1]["loss"] == first[2]["loss"]  # the reported loss is the task's own
    assert first[0]["grad_norm"] == first[1]["grad_norm"] != first[2]["grad_norm"]
    assert set(files(tmp_path / "plain")) == {store.MODEL, store.OPTIMIZER}


def test_the_text_of_the_task_and_its_first_weights_are_those_of_the_plain_run(bmi, config):
    plain, with_segments = prepare_task(config()), prepare_task(bmi({"nsp": 0.1}))
    (own,), valid = plain.read(3, WORLD)
    batches, valid_too = with_segments.read(3, WORLD)
    assert valid == valid_too
    assert len(batches) == 2
    assert torch.equal(own.tokens_bt, batches[0].tokens_bt)
    assert torch.equal(own.targets_bt, batches[0].targets_bt)


def test_pairs_come_from_the_training_documents_alone(bmi):
    task = prepare_task(bmi({"nsp": 0.1}))
    texts = {split: [d.tokens[1:].tolist() for d in task.data.documents(split)] for split in ("train", "val", "test")}
    for step in range(5):
        pairs = task.read(step, WORLD)[0][-1].pairs
        for part in (pairs.first, pairs.next, pairs.other, pairs.later):
            for row, n in zip(part.tokens, part.lengths):
                found = row[:n].tolist()
                assert any(found == text[i : i + n] for text in texts["train"] for i in range(0, len(text), 16))
                assert task.data.tokenizer.separator not in found


def test_log_and_curve_have_each_term(bmi, base_run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = bmi({"nsp": 0.1, "raml": 0.2, "start": str(base_run)}, steps=4)
        result = train(made, tmp_path / "full", progress=False)
    shown = lines(tmp_path / "full", "train")[-1]
    assert 0 < shown["nsp"] < 10
    assert 0 <= shown["nsp_accuracy"] <= 1
    assert shown["raml"] > 0
    assert 1 <= shown["effective_pairs"] <= 6
    assert result.summary["val_curve"][-1].keys() >= {"bits_per_byte", "nsp", "nsp_accuracy"}
    assert 0 <= result.summary["test_nsp_accuracy"] <= 1
    assert "raml" not in lines(base_run, "train")[-1]
    json.dumps(result.summary, allow_nan=False)


def test_one_pair_for_all_is_warned_about_once(bmi, base_run, tmp_path):
    made = bmi({"nsp": 0.1, "raml": 0.1, "start": str(base_run), "temperature": 1e-6}, steps=3, eval_every=0)
    with pytest.warns(UserWarning, match=r"rest on 1.00 of 6 pairs .*raise objective.temperature"):
        train(made, tmp_path / "run", progress=False)
    shown = lines(tmp_path / "run", "train")
    assert all(line["effective_pairs"] == pytest.approx(1.0) for line in shown)


def test_grad_accum_changes_rounding_only(bmi, tmp_path):
    found = {}
    for accum in (1, 2):
        made = bmi({"nsp": 0.5, "critic_dropout": 0.0}, grad_accum=accum, steps=4, eval_every=0, model={"dropout": 0.0})
        train(made, tmp_path / str(accum), progress=False)
        found[accum] = [(line["loss"], line["nsp"]) for line in lines(tmp_path / str(accum), "train")]
    assert found[1][0] == pytest.approx(found[2][0], rel=1e-5)
    for one, two in zip(found[1], found[2]):
        assert one == pytest.approx(two, rel=1e-3)


def test_a_masked_lm_learns_next_segments_too(bmi, tmp_path):
    made = bmi({"nsp": 0.1})
    made = dataclasses.replace(
        made,
        model=dataclasses.replace(made.model, architecture="encoder", vocab_size=258),
        train=dataclasses.replace(made.train, steps=3, eval_every=0),
    )
    summary = train(made, tmp_path / "run", progress=False).summary
    assert summary["task"] == "masked_lm"
    assert 0 <= summary["test_nsp_accuracy"] <= 1
    assert "test_accuracy" in summary


# ---- checkpoints ----


def test_the_critic_is_beside_the_model_and_has_a_group_of_its_own(bmi, base_run, tmp_path):
    model, critic = load_model(store.newest_model(base_run)), stored_critic(bmi({"nsp": 0.1}), base_run, WORLD.device)
    assert not any("critic" in name for name, _ in model.named_parameters())
    fresh = make_critic(bmi({"nsp": 0.1}))
    moved = [not torch.equal(a, b) for a, b in zip(critic.parameters(), fresh.parameters())]
    assert all(moved)
    (group,) = prepare_task(bmi({"nsp": 0.1, "critic_lr": 1e-3})).companion.parameter_groups()
    assert group["lr_scale"] * 1e-2 == pytest.approx(1e-3)
    assert (group["weight_decay"], group["betas"], group["clipped"]) == (1e-6, (0.9, 0.999), "critic")


def test_a_full_run_begins_from_the_base_run(bmi, base_run):
    made = bmi({"nsp": 0.1, "raml": 0.1, "start": str(base_run)})
    companion, model = prepare_task(made).companion, build_model(made.model, 7)
    companion.begin(model)
    stored = store.read(store.newest_model(base_run)).tensors
    assert all(torch.equal(p, stored[store.MODEL][name]) for name, p in model.named_parameters())
    assert all(torch.equal(p, stored[store.COMPANION][name]) for name, p in companion.module.named_parameters())


def test_a_start_that_does_not_fit_is_refused(bmi, config, base_run, tmp_path):
    wide = bmi({"nsp": 0.1, "start": str(base_run), "critic_hidden": 9})
    with pytest.raises(UserError, match="does not fit this run"):
        train(wide, tmp_path / "a", progress=False)
    train(config(steps=3, eval_every=0), tmp_path / "plain", progress=False)
    with pytest.raises(UserError, match="has no critic"):
        train(bmi({"nsp": 0.1, "start": str(tmp_path / "plain")}), tmp_path / "b", progress=False)


# ---- configuration and costs ----


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"raml": 0.1}, "set objective.start"),
        ({"start": "x"}, "nothing begins from it"),
        ({"nsp": -1.0}, "at least 0"),
        ({"nsp": 0.1, "lookahead": 0.0}, "above 0"),
        ({"nsp": 0.1, "nsp_trains": "encoder"}, "unknown objective.nsp_trains"),
        ({"nsp": 0.1, "pooled": "last:9"}, "the model has layers 1 to 1"),
        ({"nsp": 0.1, "segments": "sentances:3"}, "did you mean 'sentence'"),
        ({"nsp": 0.1, "pairs": 1}, "at least 2"),
    ],
)
def test_mistakes_in_an_objective_are_named(objective, message, bmi):
    with pytest.raises(UserError, match=message):
        bmi(objective)


def test_what_an_objective_cannot_work_with_is_refused(bmi):
    made = bmi({"nsp": 0.1, "raml": 0.1, "start": "x"})
    encoder = dataclasses.replace(made.model, architecture="encoder", vocab_size=258)
    with pytest.raises(UserError, match="an encoder sees it from both sides"):
        dataclasses.replace(made, model=encoder)
    with pytest.raises(UserError, match="no next segment"):
        dataclasses.replace(
            bmi({"nsp": 0.1}), model=dataclasses.replace(made.model, architecture="seq2seq", attention="softmax")
        )
    with pytest.raises(UserError, match="live in one process"):
        bmi({"nsp": 0.1}, parallel="ddp")
    with pytest.raises(UserError, match="learned positions end at context=32"):
        bmi({"nsp": 0.1, "segments": "chunk:33"}, model={"position": "learned"})


def test_an_old_config_is_a_plain_one_and_a_new_one_comes_back(bmi, config):
    values = config().to_dict()
    del values["objective"]
    assert RunConfig.from_dict(values) == config()
    made = bmi({"nsp": 0.1, "segments": "sentence:16"})
    assert RunConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    values = made.to_dict()
    values["objective"]["nps"] = 1
    with pytest.raises(UserError, match="did you mean 'nsp'"):
        RunConfig.from_dict(values)


def test_named_objectives_on_the_command_line():
    read = lambda *words: cli.train_config(["--out", "x", *words])[0].objective
    assert read() == ObjectiveConfig()
    assert read("--objective", "bmi").nsp == RECIPES["bmi"]["nsp"]
    assert read("--objective", "bmi", "--objective.nsp", "0.02").nsp == 0.02
    full = read("--objective=bmi-full", "--objective.start", "runs/bmi")
    assert (full.nsp, full.raml, full.start) == (0.1, 0.1, "runs/bmi")
    for words, message in (
        (["--objective", "bim"], "did you mean 'bmi'"),
        (["--objective", "bmi-full"], "set objective.start"),
        (["--objective", "bmi", "--task", "translation"], "no next segment"),
    ):
        with pytest.raises(UserError, match=message):
            read(*words)


def test_a_comparison_holds_the_tasks_tokens_equal_and_says_what_is_read_on_top(bmi):
    base = bmi({})
    plan = ComparePlan(
        base=base, arms=(Arm("plain"), Arm("bmi", {"objective.nsp": "0.1"})), baseline="plain", seeds=(0, 1)
    )
    arms = resolve(plan)["arms"]
    assert arms["plain"]["tokens"] == arms["bmi"]["tokens"]
    assert (arms["plain"]["extra_tokens_per_step"], arms["bmi"]["extra_tokens_per_step"]) == (0, 6 * 3 * 16)
    assert arms["bmi"]["difference"] == [{"key": "objective.nsp", "baseline": 0.0, "value": 0.1}]
    # Two and a quarter times the tokens, without the output matrix, and a critic of two nets: more than twice as dear.
    assert 2.0 < arms["bmi"]["flops_ratio"] < 3.5
    equal = resolve(dataclasses.replace(plan, budget="flops"))["arms"]
    assert equal["bmi"]["flops"] == pytest.approx(equal["plain"]["flops"], rel=0.2)
    assert equal["bmi"]["steps"] < equal["plain"]["steps"]


def test_evaluate_reports_three_quantities(bmi, base_run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["evaluate", str(base_run), "--json", "--tokens", "500", "--segments", "chunk:8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bits_per_byte"] > 0
    assert 0 <= found["segments"]["nsp_accuracy"] <= 1
    assert found["segments"]["information"]["pairs"] > 16
    assert found["segments"]["cut"] == "chunk:8"
    assert cli.main(["evaluate", str(base_run), "--tokens", "500", "--segments", "chunk:8"]) == 0
    shown = capsys.readouterr().out
    assert "the run's own critic tells" in shown
    assert "no bound" in shown
