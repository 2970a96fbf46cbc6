"""Acceptance point 4: a run stopped by SIGKILL and resumed ends bit-equal to one never stopped."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from clearhead.train import checkpoint as store
from clearhead.train.loop import train
from tests.train.test_loop import losses, weights

RUNNER = Path(__file__).with_name("runner.py")


def start(run, config, mode):
    path = run.with_suffix(".json")
    path.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, str(RUNNER), str(run), str(path), mode]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def kill_after(process, run, step, within=60):
    """SIGKILL the process as soon as metrics.jsonl shows `step` steps, which it must in so many seconds."""
    metrics = run / "metrics.jsonl"
    deadline = time.monotonic() + within
    while True:
        done = metrics.read_text().count('"train"') if metrics.exists() else 0
        if done >= step:
            process.kill()
        if process.poll() is not None:
            break
        assert time.monotonic() < deadline, "the run did not get so far"
        time.sleep(0.005)
    assert process.wait() == -signal.SIGKILL, process.stderr.read().decode()
    process.stderr.close()


def test_killed_twice_and_resumed_equals_never_stopped(config, tmp_path):
    options = {"steps": 40, "checkpoint_every": 3, "eval_every": 7, "grad_accum": 2}
    draw = random.Random(11)
    run = tmp_path / "killed"
    for first, last in ((5, 15), (20, 35)):
        process = start(run, config(**options), "slow")
        kill_after(process, run, draw.randint(first, last))
    assert not (run / "result.json").exists()
    resumed = train(config(**options), run, progress=False)
    whole = train(config(**options), tmp_path / "whole", progress=False)

    assert resumed.summary["starts"] == 3
    assert weights(run) == weights(tmp_path / "whole")
    optimizer = [store.newest_model(path) / store.OPTIMIZER for path in (run, tmp_path / "whole")]
    assert optimizer[0].read_bytes() == optimizer[1].read_bytes()
    assert losses(run) == losses(tmp_path / "whole")
    for key in ("test_bits_per_byte", "test_documents", "val_bits_per_byte", "grad_norm", "valid_tokens"):
        assert resumed.summary[key] == whole.summary[key], key


def test_killed_while_a_checkpoint_is_written(config, tmp_path):
    run = tmp_path / "killed"
    process = start(run, config(), "die-in-checkpoint")
    _, error = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, error.decode()
    assert [path.name for path in (run / store.FOLDER).iterdir() if path.name.endswith(".part")]
    assert [path.name for path in store.checkpoints(run)] == ["step-00000004"]
    train(config(), run, progress=False)
    train(config(), tmp_path / "whole", progress=False)
    assert weights(run) == weights(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")
    assert [path.name for path in (run / store.FOLDER).iterdir()] == ["step-00000012"]


@pytest.mark.parametrize("torn", ['{"kind": "train", "step": 9, "lo', "not json\n", '{"kind": "train", "step": 99}\n'])
def test_lines_after_the_checkpoint_are_cut_off(config, tmp_path, torn):
    run = tmp_path / "run"

    def stop(event):
        if event["kind"] == "step" and event["step"] == 10:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        train(config(), run, on_event=stop, progress=False)
    with open(run / "metrics.jsonl", "a") as file:
        file.write(torn)
    train(config(), run, progress=False)
    train(config(), tmp_path / "whole", progress=False)
    assert losses(run) == losses(tmp_path / "whole")
