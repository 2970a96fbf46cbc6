"""The records and warnings of `SignalWatch`, and its place in the training loop."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clearhead.data.config import DataConfig
from clearhead.models.config import PRESETS, ModelConfig
from clearhead.models.make import build_model
from clearhead.signal.measurement import measure
from clearhead.signal.watch import SignalWatch, record_of
from clearhead.train import checkpoint as store
from clearhead.train.config import OptimConfig, RunConfig, TrainConfig
from clearhead.train.loop import train

TINY = dataclasses.replace(PRESETS["tiny"], width=32, vocab_size=97, layers=3)


def record(step: int = 0, **changes: Any) -> dict[str, Any]:
    """A healthy record of three layers."""
    stack = {
        "variance": [0.1, 1.0, 1.2, 1.5],
        "correlation": [0.1, 0.2, 0.3, 0.3],
        "gradient_variance": [50.0, 1.0, 1.1, 1.2],
        "parameter_gradient": [1.0, 1.0, 1.0],
        "score_variance": [0.5, 0.6, 0.7],
        "entropy": [0.9, 0.8, 0.9],
    }
    return {"step": step, "loss": 3.0, "stacks": {"decoder": stack | changes}}


def test_a_record_is_compact_and_plain() -> None:
    trace = measure(build_model(TINY), torch.randint(0, 97, (2, 16)))
    found = record_of(trace, 7)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["step"] == 7
    stack = found["stacks"]["decoder"]
    assert stack["variance"] == [
        trace[name].forward.variance  # type: ignore[union-attr]
        for name in (*(f"decoder.{i}.attention.input" for i in range(3)), "decoder.output")
    ]
    assert len(stack["gradient_variance"]) == len(stack["correlation"]) == 4
    assert len(stack["score_variance"]) == len(stack["entropy"]) == 3
    assert len(stack["parameter_gradient"]) == 6
    assert all(0.9 < share <= 1.0 + 1e-6 for share in stack["entropy"])


def test_a_healthy_run_is_quiet() -> None:
    watch = SignalWatch(10, settled=10)
    assert [watch.judge(record(step)) for step in range(0, 60, 10)] == [[]] * 6


CASES = {
    "collapse": ({"correlation": [0.1, 0.5, 0.99, 0.999]}, "rank collapse in the decoder.* 0.990 at layer 2 of 3"),
    "entropy": ({"entropy": [0.9, 0.05, 0.9]}, "attention saturates in the decoder: at layer 1 its entropy is 5.0%"),
    "scores": ({"score_variance": [0.5, 0.6, 20.0]}, "large scores in the decoder: at layer 2 their variance is 20"),
    "spread": ({"gradient_variance": [9.0, 1e-9, 1e-3, 1.0]}, r"differ by 1.0e\+09 in variance"),
    "variance": ({"variance": [0.1, 1.0, 3.0, 7.0]}, "stream variance of the decoder went from 1.5 .step 10. to 7"),
    "fall": ({"variance": [0.1, 0.1, 0.2, 0.3]}, "went from 1.5 .step 10. to 0.3"),
    "gradient": ({"gradient_variance": [50.0, 20.0, 5.0, 1.0]}, "differ by 20 in variance; it was 1.2 at step 10"),
    "finite": ({"variance": [0.1, None, None, None]}, "holds numbers that are not finite"),
}


@pytest.mark.parametrize("case", CASES)
def test_each_warning_is_given_when_it_begins_and_not_again_until_it_was_over(case: str) -> None:
    changes, message = CASES[case]
    watch = SignalWatch(10, settled=10)
    assert watch.judge(record(0, variance=[9.0, 9.0, 9.0, 9.0])) == []  # still warming up: not the reference
    assert watch.judge(record(10)) == []
    begun = watch.judge(record(20, **changes))
    assert len(begun) == 1
    assert begun[0].startswith("step 20: ")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(begun[0])
    assert watch.judge(record(30, **changes)) == []
    assert watch.judge(record(40)) == []
    assert len(watch.judge(record(50, **changes))) == 1


def test_replay_brings_back_reference_and_standing_warnings() -> None:
    sick = record(20, variance=[0.1, 1.0, 3.0, 7.0])
    whole, resumed = SignalWatch(10), SignalWatch(10)
    whole.judge(record(0))
    whole.judge(copy.deepcopy(sick))
    resumed.replay([record(0), sick])
    for step in (30, 40):
        later = record(step, variance=[0.1, 1.0, 3.0, 7.0] if step == 30 else [0.1, 1.0, 1.2, 1.5])
        assert whole.judge(later) == resumed.judge(later) == []
    assert whole.judge(record(50, variance=[9.0] * 4)) == resumed.judge(record(50, variance=[9.0] * 4)) != []


def test_looking_measures_the_batch_at_hand() -> None:
    model = build_model(TINY)
    ids = torch.randint(0, 97, (2, 16))
    watch = SignalWatch(5)
    assert [step for step in range(12) if watch.due(step)] == [0, 5, 10]
    assert not SignalWatch(0).due(0)
    found, warned = watch.look(model, {"tokens": ids[:, :-1], "targets": ids[:, 1:]}, 0)
    assert warned == []
    assert found["loss"] == pytest.approx(4.6, abs=0.2)
    with torch.no_grad():
        model.blocks[0].feed_forward.down.weight.mul_(1e4)  # type: ignore[union-attr]
    _, warned = watch.look(model, {"tokens": ids[:, :-1], "targets": ids[:, 1:]}, 5)
    assert any("largest stream variance" in text for text in warned)


# ---- in training ----


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    folder = tmp_path_factory.mktemp("text")
    for number in range(8):
        (folder / f"{number}.txt").write_text(f"number {number} of the texts says what was said before. " * 30)
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path_factory.mktemp("prepared")))
    return RunConfig(
        model=ModelConfig(layers=2, width=16, heads=2, context=32, dropout=0.1),
        data=DataConfig(source=str(folder), context=32, val_fraction=0.25, test_fraction=0.25),
        optim=OptimConfig(lr=1e-2, warmup_steps=2),
        train=TrainConfig(
            steps=10, batch_size=4, eval_every=5, eval_tokens=128, test_tokens=128, log_every=2, checkpoint_every=4,
            threads=1,
        ),
    )  # fmt: skip


def inspected(config: RunConfig, every: int) -> RunConfig:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, inspect_every=every))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(store.read(store.newest_model(folder)).tensors[store.MODEL])


def signals(folder: Path) -> list[dict[str, Any]]:
    events = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in events if event["kind"] == "signal"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_is_bit_equal_with_and_without(config: RunConfig, tmp_path: Path, precision: Any) -> None:
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision=precision))
    train(config, tmp_path / "without", progress=False)
    train(inspected(config, 3), tmp_path / "with", progress=False)
    without, with_looks = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert without.keys() == with_looks.keys()
    assert all(torch.equal(without[name], with_looks[name]) for name in without)
    assert [event["step"] for event in signals(tmp_path / "with")] == [0, 3, 6, 9]
    assert signals(tmp_path / "without") == []


def test_a_resumed_run_has_the_same_weights_and_records(config: RunConfig, tmp_path: Path) -> None:
    import signal
    from os import getpid, kill

    config = inspected(config, 2)
    said: dict[str, list[str]] = {"whole": [], "cut": []}

    def listen(run: str, event: dict[str, Any]) -> None:
        if event["kind"] == "warning":
            said[run].append(event["text"])

    train(config, tmp_path / "whole", progress=False, on_event=lambda event: listen("whole", event))

    def stop(event: dict[str, Any]) -> None:
        listen("cut", event)
        if event["kind"] == "signal" and event["step"] == 2:  # before anything is warned of
            kill(getpid(), signal.SIGTERM)

    assert train(config, tmp_path / "cut", progress=False, on_event=stop).status == "interrupted"
    resumed = train(config, tmp_path / "cut", progress=False, on_event=lambda event: listen("cut", event))
    assert resumed.status == "finished"
    assert said["cut"] == said["whole"] != []  # the first record, and what was warned of, outlive the stop
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    assert signals(tmp_path / "cut") == signals(tmp_path / "whole")
    assert [event["step"] for event in signals(tmp_path / "cut")] == [0, 2, 4, 6, 8]


def test_warnings_go_the_loops_way(config: RunConfig, tmp_path: Path) -> None:
    """A learning rate far too high: the run may or may not diverge, the scores surely leave their range."""
    config = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=3.0, clip_norm=None))
    said: list[str] = []
    with pytest.warns(UserWarning, match="step "):
        train(
            inspected(config, 1),
            tmp_path / "hot",
            progress=False,
            on_event=lambda event: said.append(event["text"]) if event["kind"] == "warning" else None,
        )
    assert any("largest stream variance" in text or "large scores" in text for text in said)


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_several_processes_look_alike_and_change_nothing(config: RunConfig, tmp_path: Path, parallel: Any) -> None:
    import os
    import subprocess
    import sys

    runner = Path(__file__).parents[1] / "train" / "runner.py"
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, parallel=parallel))
    for name, every in (("without", 0), ("with", 3)):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(inspected(config, every).to_dict()))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        done = subprocess.run(
            [*command, str(runner), str(tmp_path / name), str(path), ""],
            capture_output=True, text=True, timeout=180, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    without, with_looks = weights(tmp_path / "without"), weights(tmp_path / "with")
    assert all(torch.equal(without[name], with_looks[name]) for name in without)
    assert [event["step"] for event in signals(tmp_path / "with")] == [0, 3, 6, 9]


def test_inspect_every_is_checked() -> None:
    with pytest.raises(ValueError, match=r"train\.inspect_every: expected a whole number of at least 0, got -1"):
        TrainConfig(steps=1, inspect_every=-1)
