from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from clearhead.data.config import DataConfig
from clearhead.errors import UserError
from clearhead.train import checkpoint as store
from clearhead.train import loop
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.folder import claim, read_config
from clearhead.train.history import gradient_statistics
from clearhead.train.loop import train
from clearhead.train.tasks import causal_lm


def lines(run, kind):
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in events if event["kind"] == kind]


def weights(run):
    return (store.newest_model(run) / store.MODEL).read_bytes()


def losses(run):
    """Everything in metrics.jsonl that does not depend on the clock."""
    return [
        {key: value for key, value in event.items() if "seconds" not in key and "per_second" not in key}
        for event in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ]


def test_a_whole_run(config, tmp_path):
    run = tmp_path / "run"
    events = []
    result = train(config(), run, on_event=events.append, progress=False)
    assert (result.status, result.reason) == ("finished", "")
    assert read_config(run) == config()
    assert json.loads((run / "result.json").read_text()) == {
        "status": "finished", "reason": "", "summary": result.summary,
    }  # fmt: skip

    train_lines, evals = lines(run, "train"), lines(run, "eval")
    assert [event["step"] for event in train_lines] == list(range(1, 13))
    assert [event["step"] for event in evals] == [5, 10, 12]
    assert train_lines[-1]["tokens"] == 12 * 4 * 32
    assert train_lines[-1]["loss"] < train_lines[0]["loss"]
    assert train_lines[0]["lr"] == pytest.approx(0.005)
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, 13))

    summary = result.summary
    assert summary["steps"] == 12
    assert summary["val_bits_per_byte"] == evals[-1]["bits_per_byte"]
    assert [point["step"] for point in summary["val_curve"]] == [5, 10, 12]
    scored = sum(document["tokens"] for document in summary["test_documents"])
    assert scored == summary["test_tokens"]
    nats = sum(document["nats"] for document in summary["test_documents"])
    assert summary["test_bits_per_byte"] == pytest.approx(nats / math.log(2) / summary["test_bytes"])
    assert summary["skipped_steps"] == 0
    assert summary["grad_norm"]["median"] == pytest.approx(np.median([e["grad_norm"] for e in train_lines]))
    assert summary["parameters"]["total"] > 0
    assert summary["threads"] == 1
    assert summary["tokens_per_second"] > 0
    assert summary["cpu_seconds"] > 0
    json.dumps(summary, allow_nan=False)


def test_a_finished_folder_answers_at_once(config, tmp_path, monkeypatch):
    first = train(config(), tmp_path / "run", progress=False)
    monkeypatch.setattr(loop, "prepare_task", lambda *a, **k: pytest.fail("the run was done again"))
    assert train(config(), tmp_path / "run", progress=False) == first


def test_repeats_bit_by_bit_and_seeds_differ(config, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(config(seed=seed), tmp_path / name, progress=False)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_evaluating_more_often_changes_no_weight(config, tmp_path):
    train(config(eval_every=0, checkpoint_every=0), tmp_path / "seldom", progress=False)
    train(config(eval_every=1, checkpoint_every=1), tmp_path / "often", progress=False)
    assert weights(tmp_path / "seldom") == weights(tmp_path / "often")
    assert len(lines(tmp_path / "seldom", "eval")) == 1


def test_grad_accum_changes_rounding_only(config, tmp_path):
    runs = {}
    for accum in (1, 4):
        train(config(grad_accum=accum, steps=4, model={"dropout": 0.0}), tmp_path / str(accum), progress=False)
        runs[accum] = [event["loss"] for event in lines(tmp_path / str(accum), "train")]
    assert runs[1] == pytest.approx(runs[4], rel=1e-4)


def test_log_every_gives_the_mean_of_its_steps(config, tmp_path):
    train(config(log_every=1), tmp_path / "each", progress=False)
    train(config(log_every=5), tmp_path / "fifth", progress=False)
    each = [event["loss"] for event in lines(tmp_path / "each", "train")]
    fifth = [event["loss"] for event in lines(tmp_path / "fifth", "train")]
    assert fifth == pytest.approx([np.mean(each[:5]), np.mean(each[5:10]), np.mean(each[10:])])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_call_goes_on(config, tmp_path, number):
    before = signal.getsignal(number)

    def on_event(event):
        if event["kind"] == "step" and event["step"] == 7:
            os.kill(os.getpid(), number)

    run = tmp_path / "run"
    stopped = train(config(checkpoint_every=0), run, on_event=on_event, progress=False)
    assert (stopped.status, stopped.reason) == ("interrupted", "stopped after step 7 of 12")
    assert signal.getsignal(number) is before
    assert not (run / "result.json").exists()
    assert [folder.name for folder in store.checkpoints(run)] == ["step-00000007"]

    resumed = train(config(checkpoint_every=0), run, progress=False)
    assert resumed.status == "finished"
    assert resumed.summary["starts"] == 2
    train(config(checkpoint_every=0), tmp_path / "whole", progress=False)
    assert weights(run) == weights(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


def test_a_signal_during_an_evaluation(config, tmp_path, monkeypatch):
    """The weights are saved at once, and the evaluation is made up for."""
    real = causal_lm.evaluate

    def evaluate(*arguments, should_stop, **options):
        if not list((tmp_path / "run" / "checkpoint").glob("step-*5")):
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments, should_stop=should_stop, **options)

    monkeypatch.setattr(causal_lm, "evaluate", evaluate)
    assert train(config(), tmp_path / "run", progress=False).status == "interrupted"
    assert lines(tmp_path / "run", "eval") == []
    monkeypatch.undo()
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path / "again"))
    train(config(), tmp_path / "run", progress=False)
    train(config(), tmp_path / "whole", progress=False)
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")


def test_a_second_interrupt_stops_at_once(config, tmp_path):
    def on_event(event):
        if event["kind"] == "step" and event["step"] == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(config(), tmp_path / "run", on_event=on_event, progress=False)
    assert store.checkpoints(tmp_path / "run") == []


def test_training_outside_the_main_thread(config, tmp_path):
    results = []
    thread = threading.Thread(
        target=lambda: results.append(train(config(steps=3), tmp_path / "run", progress=False).status)
    )
    thread.start()
    thread.join()
    assert results == ["finished"]


def test_a_diverged_run_is_a_result(config, tmp_path):
    wild = config(optim={"lr": 1e30, "clip_norm": None}, steps=30)
    result = train(wild, tmp_path / "run", progress=False)
    assert result.status == "diverged"
    assert "not finite" in result.reason
    assert result.summary["steps"] < 30
    assert result.summary["test_bits_per_byte"] is None
    json.loads((tmp_path / "run" / "result.json").read_text(), parse_constant=pytest.fail)
    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
    assert train(wild, tmp_path / "run", progress=False) == result  # and is not tried again


def test_steps_without_finite_gradient_in_a_row_are_divergence_and_single_ones_are_not(config, tmp_path, monkeypatch):
    real = loop.build_model

    def poisoned(at):
        def build(*arguments):
            model, calls = real(*arguments), []

            def hook(gradient):
                calls.append(1)
                return gradient * (math.nan if len(calls) in at else 1.0)

            model.embedding.weight.register_hook(hook)
            return model

        return build

    monkeypatch.setattr(loop, "build_model", poisoned({3, 4, 8}))
    result = train(config(diverged_after=3), tmp_path / "some", progress=False)
    assert result.status == "finished"
    assert result.summary["skipped_steps"] == 3
    assert lines(tmp_path / "some", "train")[2]["grad_norm"] is None

    monkeypatch.setattr(loop, "build_model", poisoned({5, 6, 7}))
    result = train(config(diverged_after=3), tmp_path / "row", progress=False)
    assert result.status == "diverged"
    assert "3 steps in a row, to step 7" in result.reason
    assert result.summary["steps"] == 7


def test_not_a_number_in_the_weights_is_divergence_and_is_never_saved(config, tmp_path):
    def on_event(event):
        if event["kind"] == "step" and event["step"] == 6:
            with torch.no_grad():
                poison[0].norm.weight[0] = math.nan

    poison = []
    real = loop.build_model

    def build(*arguments):
        poison.append(real(*arguments))
        return poison[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_model", build)
        result = train(config(checkpoint_every=2, eval_every=0), tmp_path / "run", on_event=on_event, progress=False)
    assert (result.status, result.reason) == ("diverged", "weights not finite after step 6")
    assert [folder.name for folder in store.checkpoints(tmp_path / "run")] == ["step-00000004", "step-00000002"]


def test_a_crash_is_recorded_and_can_go_on(config, tmp_path):
    def on_event(event):
        if event["kind"] == "step" and event["step"] == 6:
            raise RuntimeError("out of\nluck")

    with pytest.raises(RuntimeError, match="out of"):
        train(config(), tmp_path / "run", on_event=on_event, progress=False)
    written = json.loads((tmp_path / "run" / "result.json").read_text())
    assert written["status"] == "crashed"
    assert written["reason"] == "RuntimeError: out of luck"
    assert train(config(), tmp_path / "run", progress=False).status == "finished"


def test_another_config_in_the_folder(config, tmp_path):
    train(config(steps=3), tmp_path / "run", progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"optim.lr is 0.01 there, 0.02 here; use another folder") as caught:
        train(config(steps=3, optim={"lr": 0.02}), tmp_path / "run", progress=False)
    assert "\n" not in str(caught.value)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert after == before


def test_resume_false_refuses_a_used_folder(config, tmp_path):
    train(config(steps=3), tmp_path / "run", resume=False, progress=False)
    with pytest.raises(UserError, match="already holds a run"):
        train(config(steps=3), tmp_path / "run", resume=False, progress=False)


def test_a_folder_of_unknown_origin_is_left_alone(config, tmp_path):
    (tmp_path / "metrics.jsonl").write_text("mine\n")
    with pytest.raises(UserError, match=r"holds metrics.jsonl but no config.json"):
        train(config(), tmp_path, progress=False)
    assert (tmp_path / "metrics.jsonl").read_text() == "mine\n"


def test_two_processes_in_one_folder(config, tmp_path):
    with claim(tmp_path / "run", config(), resume=True), pytest.raises(UserError, match="in use by another process"):
        train(config(), tmp_path / "run", progress=False)
    train(config(steps=3), tmp_path / "other", progress=False)


def test_text_that_changed_in_between(config, tmp_path):
    source = tmp_path / "own.txt"
    source.write_text("some words and then some more " * 200)
    run = dataclasses.replace(config(), data=DataConfig(source=str(source), context=32))

    def on_event(event):
        if event["kind"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    train(run, tmp_path / "run", on_event=on_event, progress=False)
    source.write_text("quite another text than before " * 200)
    with pytest.raises(UserError, match="has changed since this run began"):
        train(run, tmp_path / "run", progress=False)


def test_another_torch_is_said(config, tmp_path, monkeypatch):
    def on_event(event):
        if event["kind"] == "step" and event["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    train(config(), tmp_path / "run", on_event=on_event, progress=False)
    monkeypatch.setattr(torch, "__version__", "2.0.0")
    with pytest.warns(UserWarning, match=r"begun with torch .*; the last bits may differ"):
        train(config(), tmp_path / "run", progress=False)


def test_threads_of_the_first_start_are_kept(config, tmp_path):
    def on_event(event):
        if event["kind"] == "step":
            os.kill(os.getpid(), signal.SIGTERM)

    run = config(threads=None, steps=2, eval_every=0, optim={"warmup_steps": 0})
    torch.set_num_threads(2)
    assert train(run, tmp_path / "run", on_event=on_event, progress=False).summary["threads"] == 2
    torch.set_num_threads(1)
    assert train(run, tmp_path / "run", progress=False).summary["threads"] == 2


def test_device_and_launcher_that_are_not_there(config, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"train.device: expected auto, cpu, cuda"):
        train(config(device="tpu9"), tmp_path / "a", progress=False)
    with pytest.raises(UserError, match="this is the only one; start it by `torchrun"):
        train(config(parallel="ddp"), tmp_path / "b", progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="would train 2 models apart"):
        train(config(), tmp_path / "c", progress=False)
    assert not any((tmp_path / name).exists() for name in "abc")


def test_the_callers_settings_come_back(config, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    threads = torch.get_num_threads()
    train(config(steps=2, optim={"warmup_steps": 0}, threads=2), tmp_path / "run", progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_bf16_and_tensorboard_and_progress(config, tmp_path, capsys):
    result = train(config(precision="bf16", tensorboard=True), tmp_path / "run")
    assert result.status == "finished"
    assert "step 12: validation" in capsys.readouterr().err
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))
    assert [event.step for event in board.Scalars("val/bits_per_byte")] == [5, 10, 12]


def test_gradient_statistics_count_spikes():
    norms = np.ones(300)
    norms[[50, 200]] = [9.0, 11.0]
    norms[100] = math.inf
    found = gradient_statistics(norms)
    assert found["median"] == 1.0
    assert found["max"] == 11.0
    assert found["spikes"] == 1
    assert found["not_finite"] == 1


def test_a_start_that_fails_on_its_text_does_not_claim_the_folder(tmp_path: Path) -> None:
    """The next command, with the mistake mended, may use the same folder."""
    run, text = tmp_path / "run", tmp_path / "bad.txt"
    text.write_bytes(b"\xff\xfe not text")
    config = RunConfig(data=DataConfig(source=str(text)), train=TrainConfig(steps=1), optim=OptimConfig(warmup_steps=0))
    with pytest.raises(UserError, match="UTF-8"):
        train(config, run, progress=False)
    assert not (run / "config.json").exists()
