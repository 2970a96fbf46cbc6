"""State tracking, short: what experiments/feedback asks in full."""

from __future__ import annotations

import pytest
import torch
from experiments.feedback.task import STATES, accuracy_by_band, draw
from experiments.feedback.train import Setup, run_one


def test_the_task_is_what_its_docstring_says():
    streams = draw(16, 200, torch.Generator().manual_seed(0))
    for tokens, values, since in zip(streams.tokens.tolist(), streams.values.tolist(), streams.since.tolist()):
        value, steps = None, -1
        for token, wanted, ago in zip(tokens, values, since):
            if token < STATES:
                value, steps = token, 0
            elif value is not None:
                value, steps = (value + (0, 1, -1)[token - STATES]) % STATES, steps + 1
            assert steps == ago
            assert value is None or value == wanted
    sets = (streams.tokens < STATES).double().mean()
    assert 0.03 < float(sets) < 0.05
    right = torch.tensor([[True, True, False, True]])
    since = torch.tensor([[-1, 0, 3, 70]])
    found = accuracy_by_band(right, since)
    assert (found["0-3"], found["4-7"], found["64+"]) == (0.5, None, 1.0)


def test_both_models_have_the_same_past_to_look_at():
    feedback, plain = Setup("feedback", 1).config(), Setup("decoder", 1).config()
    assert plain.attention == f"softmax+window:{feedback.feedback_window + 1}"  # its own key is one of them


@pytest.mark.full
def test_feedback_tracks_a_state_and_a_decoder_of_more_layers_does_not():
    """The falsifier: 16 to 31 steps after the counter was set, .9 for one layer of feedback, .4 for a plain decoder."""
    steps = 500
    feedback = run_one(Setup("feedback", 1), seed=0, steps=steps)["accuracy"]["16-31"]
    plain = run_one(Setup("decoder", 4), seed=0, steps=steps)["accuracy"]["16-31"]
    assert feedback >= 0.9
    assert plain <= 0.4
