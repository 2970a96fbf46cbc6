"""Two processes over gloo against one: the same losses and weights within rounding."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from clearhead.data.text import TextData
from clearhead.train import checkpoint as store
from clearhead.train.loop import train
from tests.train.runner import uneven_batch
from tests.train.test_loop import lines

RUNNER = Path(__file__).with_name("runner.py")
STILL = {"dropout": 0.0}  # each process draws its own dropout


def torchrun(run, config, mode):
    path = run.with_suffix(".json")
    path.write_text(json.dumps(config.to_dict()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*command, str(RUNNER), str(run), str(path), mode],
        capture_output=True, text=True, timeout=120, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize(("parallel", "accum"), [("ddp", 2), pytest.param("fsdp", 2, marks=pytest.mark.full)])
def test_two_processes_equal_one(config, tmp_path, monkeypatch, parallel, accum):
    """With rows whose numbers of counted targets all differ, so that a mean of means would be another number."""
    # Large eps: at Adam's default, a gradient entry that is all but 0 steps by the sign of its rounding error.
    options = {"model": STILL, "optim": {"eps": 1e-3}, "grad_accum": accum, "batch_size": 8}
    said = torchrun(tmp_path / "two", config(parallel=parallel, **options), "uneven")
    assert said == ["finished", "finished"]

    monkeypatch.setattr(TextData, "batch", uneven_batch)
    one = train(config(**options), tmp_path / "one", progress=False)
    two = json.loads((tmp_path / "two" / "result.json").read_text())["summary"]
    assert two["processes"] == 2
    assert two["valid_tokens"] == one.summary["valid_tokens"] < one.summary["tokens"]
    assert two["test_bits_per_byte"] == pytest.approx(one.summary["test_bits_per_byte"], rel=1e-5)
    assert two["test_tokens"] == one.summary["test_tokens"]
    for kind, key in (("train", "loss"), ("train", "grad_norm"), ("eval", "bits_per_byte")):
        ours = [event[key] for event in lines(tmp_path / "two", kind)]
        assert ours == pytest.approx([event[key] for event in lines(tmp_path / "one", kind)], rel=1e-4)
    stored = [store.read(store.newest_model(tmp_path / name)).tensors for name in ("one", "two")]
    for file in (store.MODEL, store.OPTIMIZER):
        for name, tensor in stored[0][file].items():
            torch.testing.assert_close(
                stored[1][file][name], tensor, rtol=1e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_resume(config, tmp_path, parallel):
    """Cut back to an earlier checkpoint, two processes end bit-equal: sharded weights and moments come back whole."""
    run = tmp_path / "run"
    torchrun(run, config(parallel=parallel, steps=8), "")
    reference = store.read(store.newest_model(run)).tensors
    shutil.rmtree(run)
    torchrun(run, config(parallel=parallel, steps=8), "stop-at-6")
    assert store.checkpoints(run)[0].name == "step-00000006"
    torchrun(run, config(parallel=parallel, steps=8), "")
    resumed = store.read(store.newest_model(run)).tensors
    for file in (store.MODEL, store.OPTIMIZER):
        for name, tensor in reference[file].items():
            assert torch.equal(resumed[file][name], tensor), name


XL = {"position": "xl", "memory": "lengths:40", "xl_width": 8}
FEEDBACK = {"architecture": "feedback", "feedback_carry": True, "feedback_window": 12, "feedback_block": 16}


@pytest.mark.full
@pytest.mark.parametrize(("parallel", "memory"), [("ddp", XL), ("fsdp", XL), ("ddp", FEEDBACK)])
def test_two_processes_with_a_memory_equal_one(config, tmp_path, parallel, memory):
    """Each has the memory of its own rows; the checkpoint has all of them, and they resume from it."""
    model = STILL | memory
    options = {"model": model, "optim": {"eps": 1e-3}, "grad_accum": 2, "batch_size": 8, "steps": 8}
    torchrun(tmp_path / "two", config(parallel=parallel, **options), "stop-at-6")
    assert store.checkpoints(tmp_path / "two")[0].name == "step-00000006"
    torchrun(tmp_path / "two", config(parallel=parallel, **options), "")
    one = train(config(**options), tmp_path / "one", progress=False)
    two = json.loads((tmp_path / "two" / "result.json").read_text())["summary"]
    assert two["test_bits_per_byte"] == pytest.approx(one.summary["test_bits_per_byte"], rel=1e-5)
    assert two["test_tokens"] == one.summary["test_tokens"]
    held = [store.read(store.newest_model(tmp_path / name)).tensors[store.MEMORY] for name in ("one", "two")]
    assert held[0].keys() == held[1].keys()
    for name, tensor in held[0].items():
        torch.testing.assert_close(held[1][name], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.full
@pytest.mark.skipif(
    shutil.which("c++") is None and shutil.which("g++") is None, reason="torch.compile needs a compiler"
)
def test_compiled_comes_close_to_eager(config, tmp_path):
    for compiled in (False, True):
        train(
            config(compile=compiled, steps=2, optim={"warmup_steps": 0}, model=STILL | {"attention": "softmax"}),
            tmp_path / str(compiled),
            progress=False,
        )
    eager, compiled = ([event["loss"] for event in lines(tmp_path / name, "train")] for name in ("False", "True"))
    assert compiled == pytest.approx(eager, rel=1e-4)
