"""A Feedback Transformer through the package's own trainer: learns, and resumes to the last bit."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clearhead import cli
from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.feedback import FeedbackDecoder
from clearhead.models.io import load_model
from clearhead.train import checkpoint as store
from clearhead.train.evaluate import evaluate
from clearhead.train.evaluate_stream import evaluate_stream
from clearhead.train.loop import train
from clearhead.train.tasks.stream_lm import StreamLM
from clearhead.train.tasks.task import prepare_task
from clearhead.train.world import World
from tests.train.test_evaluate import Data
from tests.train.test_loop import losses, weights

MODEL = {
    "architecture": "feedback", "attention": "softmax", "position": "relative_key", "feedback_window": 6,
    "feedback_block": 10,
}  # fmt: skip

STREAM = MODEL | {"feedback_carry": True, "feedback_window": 20, "feedback_block": 16}


def test_trains_on_text_and_resumes_to_the_last_bit(config, tmp_path):
    chosen = config(model=MODEL)
    whole = train(chosen, tmp_path / "whole", progress=False)
    assert whole.status == "finished"

    def stop(event):
        if event["kind"] == "step" and event["step"] == 6:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        train(chosen, tmp_path / "cut", progress=False, on_event=stop)
    again = train(chosen, tmp_path / "cut", progress=False)
    assert again.status == "finished"
    first, second = (load_model(store.checkpoints(tmp_path / name)[0]) for name in ("whole", "cut"))
    assert isinstance(first, FeedbackDecoder)
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert np.mean(losses[-3:]) < losses[0] - 0.5


def test_the_command_line_trains_and_continues_a_text(text, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["train", "--out", str(folder), "--data", str(text), "--context", "24", "--steps", "2", "--model", "tiny"]
    words += ["--model.architecture", "feedback", "--model.width", "16", "--model.feedback-window", "5"]
    words += ["--train.threads", "1", "--train.test-tokens", "200", "--train.eval-tokens", "100"]
    assert cli.main(words) == 0
    capsys.readouterr()
    assert cli.main(["generate", str(folder), "--prompt", "abc", "--tokens", "40"]) == 0
    assert capsys.readouterr().out.startswith("abc")
    assert cli.main(["evaluate", str(folder), "--json", "--tokens", "200"]) == 0
    assert json.loads(capsys.readouterr().out)["bits_per_byte"] > 0


def test_the_command_line_says_what_does_not_fit(capsys):
    for words, message in (
        (["--model.architecture", "feedbak"], "did you mean 'feedback'"),
        (["--model.architecture", "feedback", "--task", "masked_lm"], "does not train architecture=feedback"),
    ):
        assert cli.main(["train", "--out", "x", *words]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
    chosen, _ = cli.train_config(["--out", "x", "--model.architecture", "encoder"])
    assert chosen.task == "masked_lm"


# ---- streams: memories go from segment to segment ----


def stop_at(made, folder, step):
    def stop(event):
        if event["kind"] == "step" and event["step"] == step:
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        train(made, folder, on_event=stop, progress=False)


def test_a_stream_stopped_and_resumed_equals_one_never_stopped(config, tmp_path):
    """300 tokens and more a document, segments of 32 and 12 steps: documents end and begin inside the run."""
    made = config(model=STREAM, grad_accum=2)
    stop_at(made, tmp_path / "run", 7)
    train(made, tmp_path / "run", progress=False)
    train(made, tmp_path / "whole", progress=False)
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    held = [store.newest_model(tmp_path / name) / store.MEMORY for name in ("run", "whole")]
    assert held[0].read_bytes() == held[1].read_bytes()
    # And the memories count: without them the run goes on otherwise.
    stop_at(made, tmp_path / "empty", 7)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StreamLM, "restore", lambda *_: None)
        train(made, tmp_path / "empty", progress=False)
    assert losses(tmp_path / "empty")[:4] == losses(tmp_path / "whole")[:4]
    assert losses(tmp_path / "empty")[4] != losses(tmp_path / "whole")[4]


def test_lanes_carry_what_each_document_alone_would(config):
    """Three steps of the task give the nats of its lanes read whole, documents apart; micro-batches hold their rows."""
    world = World(0, 1, torch.device("cpu"), "none")
    model = FeedbackDecoder(ModelConfig(vocab_size=257, layers=1, width=16, heads=2, context=32, **STREAM)).eval()
    tasks = [prepare_task(config(model=STREAM, grad_accum=n)) for n in (1, 2)]
    read, nats = [], [0.0, 0.0]
    steps = 14  # a document has about 1,300 bytes and a lane begins anywhere
    with torch.no_grad():
        for step in range(steps):
            for index, task in enumerate(tasks):
                batches = task.read(step, world)[0]
                read += batches if index == 0 else []
                nats[index] += sum(float(batch.loss(model)[1]) for batch in batches)
        tokens, targets, segments = (
            torch.cat([getattr(batch, name) for batch in read], dim=1)
            for name in ("tokens_bt", "targets_bt", "segments_bt")
        )
        whole = F.cross_entropy(model(tokens, segments=segments).flatten(0, 1), targets.flatten(), reduction="sum")
    assert (segments[:, 1:] != segments[:, :-1]).any()
    assert nats == pytest.approx([float(whole)] * 2, rel=1e-5)
    one, two = (task.state(world) for task in tasks)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], msg=name)
    tasks[1].restore(one, world)
    assert torch.equal(tasks[1].memories[1].memory, one["memory"][2:])
    tasks[1].forget()
    assert not tasks[1].memories[1].memory.any()


def test_documents_scored_by_segments_score_as_one_long_window():
    made = FeedbackDecoder(ModelConfig(**(MODEL | {"vocab_size": 11, "layers": 1, "width": 16, "heads": 2})))
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    data = Data(29, 3, 60)
    plain = evaluate(made, data, "test", context=64)
    for batch_size, segment in ((1, 8), (3, 8), (2, 60)):
        result = evaluate_stream(made, data, "test", batch_size=batch_size, segment=segment)
        assert result.nats == pytest.approx(plain.nats, rel=1e-5)
    assert result.to_dict()["memory"] == "feedback:6"
    with pytest.raises(UserError, match="feedback_window=6 tokens, and no other number"):
        evaluate_stream(made, data, "test", layout="full:8")


def test_the_command_line_trains_a_stream(text, tmp_path, capsys):
    folder = tmp_path / "run"
    words = ["train", "--out", str(folder), "--data", str(text), "--segment", "24", "--steps", "2", "--model", "tiny"]
    words += ["--model.architecture", "feedback", "--model.width", "16", "--model.feedback-carry"]
    words += ["--train.threads", "1", "--train.test-tokens", "200", "--train.eval-tokens", "100"]
    assert cli.main(words) == 0
    assert (store.newest_model(folder) / store.MEMORY).exists()
    capsys.readouterr()
    assert cli.main(["evaluate", str(folder), "--tokens", "200"]) == 0
    assert "memory feedback:64" in capsys.readouterr().out
