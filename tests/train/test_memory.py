"""Training with a memory: it is carried from step to step, saved, and a stopped run goes on bit for bit."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clearhead.models.config import ModelConfig
from clearhead.models.decoder import Decoder
from clearhead.train import checkpoint as store
from clearhead.train.evaluate import evaluate
from clearhead.train.evaluate_stream import evaluate_stream
from clearhead.train.loop import train
from clearhead.train.tasks.task import prepare_task
from clearhead.train.world import World
from tests.train.test_evaluate import Data
from tests.train.test_killed import kill_after, start
from tests.train.test_loop import losses, weights

MODEL = {"position": "xl", "memory": "lengths:40", "xl_width": 8}


def test_stopped_and_resumed_equals_never_stopped(config, tmp_path):
    made = config(model=MODEL, grad_accum=2)

    def stop(event):
        if event["kind"] == "step" and event["step"] == 7:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        train(made, tmp_path / "run", on_event=stop, progress=False)
    resumed = train(made, tmp_path / "run", progress=False)
    whole = train(made, tmp_path / "whole", progress=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    assert resumed.summary["test_bits_per_byte"] == whole.summary["test_bits_per_byte"]
    held = [store.newest_model(tmp_path / name) / store.MEMORY for name in ("run", "whole")]
    assert held[0].read_bytes() == held[1].read_bytes()


def test_killed_and_resumed_equals_never_stopped(config, tmp_path):
    made = config(model=MODEL, steps=24, checkpoint_every=3, eval_every=7)
    run = tmp_path / "killed"
    kill_after(start(run, made, "slow"), run, 8)
    train(made, run, progress=False)
    train(made, tmp_path / "whole", progress=False)
    assert weights(run) == weights(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


def test_a_resumed_run_needs_its_memory(config, tmp_path):
    """The test above would not notice a memory that is never read: without it the losses differ."""
    made = config(model=MODEL, steps=6, checkpoint_every=3)

    def stop(event):
        if event["kind"] == "checkpoint":
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        train(made, tmp_path / "run", on_event=stop, progress=False)
    from clearhead.train.tasks.stream_lm import StreamLM

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamLM, "restore", lambda *_: None)
        train(made, tmp_path / "run", progress=False)
    train(made, tmp_path / "whole", progress=False)
    one, two = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert one[:3] == two[:3]
    assert one[3] != two[3]


def test_micro_batches_have_the_memories_of_their_rows(config):
    """Two micro-batches hold what one whole batch holds, row by row, and give and take it whole."""
    world = World(0, 1, torch.device("cpu"), "none")
    model = Decoder(ModelConfig(vocab_size=257, layers=1, width=16, heads=2, context=32, **MODEL)).eval()
    tasks = [prepare_task(config(model=MODEL, grad_accum=n)) for n in (1, 2)]
    for step in range(3):
        for task in tasks:
            for batch in task.read(step, world)[0]:
                batch.loss(model)
    whole, parts = (task.state(world) for task in tasks)
    assert whole.keys() == parts.keys()
    for name, value in whole.items():
        torch.testing.assert_close(value, parts[name], msg=name)
    tasks[1].restore(whole, world)
    assert torch.equal(tasks[1].memories[1].inputs[0], whole["inputs.0"][2:])


def test_a_step_that_is_not_finite_leaves_nothing_in_the_memory(config, tmp_path):
    made = config(model=MODEL, steps=6, diverged_after=3)
    from clearhead.train import loop

    real = loop.train_step

    def spoil(called, *arguments, **options):
        result = real(called, *arguments, **options)
        if len(seen) == 2:
            arguments[1][0].memory.inputs[0].fill_(float("nan"))
            result = type(result)(float("nan"), float("nan"), True, False)
        seen.append(result)
        return result

    seen: list[object] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", spoil)
        result = train(made, tmp_path / "run", progress=False)
    assert result.status == "finished"
    assert [r.skipped for r in seen] == [False, False, True, False, False, False]
    assert np.isfinite([r.loss for r in seen[3:]]).all()


# ---- evaluation ----


@pytest.fixture
def model():
    made = Decoder(ModelConfig(vocab_size=11, layers=2, width=16, heads=2, context=8, position="xl", memory="full:64"))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    return made.train()


def test_a_memory_of_everything_scores_as_one_long_window(model):
    data = Data(29, 3, 60)
    plain = evaluate(model, data, "test", context=64)
    for batch_size in (1, 2, 3):
        result = evaluate_stream(model, data, "test", batch_size=batch_size)
        assert result.tokens == plain.tokens
        assert result.nats == pytest.approx(plain.nats, rel=1e-6)
        assert [d.name for d in result.per_document] == [d.name for d in plain.per_document]
        for one, two in zip(result.per_document, plain.per_document, strict=True):
            assert one.nats == pytest.approx(two.nats, rel=1e-5)
    assert model.training
    assert result.to_dict()["memory"] == "full:64"


def test_more_memory_than_in_training_is_used(model):
    data = Data(60)
    short, long = (evaluate_stream(model, data, "test", layout=text).nats for text in ("full:0", "full:60"))
    assert short != long
    assert evaluate_stream(model, data, "test", layout="full:60", segment=60).nats == pytest.approx(long, rel=1e-6)


def test_a_share_of_each_document_is_scored(model):
    result = evaluate_stream(model, Data(40, 80), "test", max_tokens=60)
    assert [d.tokens for d in result.per_document] == [20, 40]


def test_the_run_says_what_it_remembered(config, tmp_path):
    train(config(model=MODEL), tmp_path / "run", progress=False)
    summary = json.loads((tmp_path / "run" / "result.json").read_text())["summary"]
    assert summary["test_tokens"] > 0
    assert sum(d["tokens"] for d in summary["test_documents"]) == summary["test_tokens"]
