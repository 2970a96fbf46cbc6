"""A Feedback Transformer through the package's own trainer: learns, and resumes to the last bit."""

from __future__ import annotations

import json
from contextlib import suppress

import numpy as np
import torch

from clearhead import cli
from clearhead.models.feedback import FeedbackDecoder
from clearhead.models.io import load_model
from clearhead.train import checkpoint as store
from clearhead.train.loop import train

MODEL = {
    "architecture": "feedback", "attention": "softmax", "position": "relative_key", "feedback_window": 6,
    "feedback_block": 10,
}  # fmt: skip


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
