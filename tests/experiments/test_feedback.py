"""experiments/feedback: what is cut short changes nothing, equal time is read off the curves, tables say what is."""

from __future__ import annotations

import pytest
import torch
from experiments.feedback import figure, text, tracking
from experiments.feedback.task import VOCABULARY, band_names
from experiments.feedback.train import WINDOW, Setup

from clearhead.models.make import build_model


@pytest.mark.parametrize("layers", [1, 2])
def test_a_decoder_lacks_nothing_that_it_could_see(layers):
    """It is trained on its block and `reach` tokens before: the block's outputs are those of the whole stream."""
    setup = Setup("decoder", layers)
    model = build_model(setup.config(), seed=0).double().eval()
    tokens = torch.randint(0, VOCABULARY, (2, 60), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole, cut, shorter = (model(tokens[:, first:])[:, -1] for first in (0, 59 - setup.reach, 60 - setup.reach))
    assert setup.reach == layers * WINDOW
    torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-6)  # angles are fp32
    assert (shorter - whole).abs().max() > 1e-5


def run_of(setup, seed, accuracy):
    bands = dict.fromkeys(band_names(), accuracy)
    return {
        "model": setup.name, "seed": seed, "steps": tracking.STEPS, "accuracy": bands, "parameters": 7,
        "shares": None, "cpu_seconds": 2.0,
    }  # fmt: skip


def test_tables_and_verdicts_follow_from_the_runs():
    runs = [run_of(setup, seed, 0.25) for setup in tracking.SETUPS[:3] for seed in range(3)]
    runs += [run_of(Setup("feedback", 1), seed, 0.97 + 0.01 * seed) for seed in range(3)]
    rows = tracking.summary(runs)
    assert "0.98 ± 0.02" in tracking.table(rows)[-1]
    assert [line.rpartition(" ")[2] for line in tracking.judge(rows)] == ["holds", "holds"]
    runs += [run_of(Setup("feedback", 1), 3, 0.89), run_of(Setup("decoder", 4), 3, 0.41)]
    assert [line.rpartition(" ")[2] for line in tracking.judge(tracking.summary(runs))] == ["fails", "fails"]
    assert figure.draw_all(rows, None).count("<path") > 4


def test_every_job_has_a_key_of_its_own():
    keys = [tracking.key_of_job(job) for job in tracking.jobs()]
    assert len(set(keys)) == len(keys) == 21


def test_equal_time_is_read_at_the_end_of_the_baseline():
    def arm(name, seconds, *bits):
        speed = {"median_seconds": seconds, "tokens_per_step": 10}
        return {"name": name, "speed": speed, "tokens": [10, 20, 40], "bits": list(map(list, bits))}

    # The baseline ends after 4 steps of 1 s; the other has done 1.5 steps of 8/3 s, half-way from 3 to 2 bits.
    found = {"arms": [arm("base", 1.0, (3, 2, 1), (3, 2, 2)), arm("slow", 8 / 3, (3, 2, 1), (4, 2, 1))]}
    base, slow = text.equal_time(found)
    assert base["bits"] == [1, 2]
    assert (base["steps"], slow["steps"]) == (4, 1)
    assert slow["bits"] == pytest.approx([2.5, 3.0])
    assert slow["difference"] == pytest.approx(1.25)


def test_arms_differ_in_architecture_and_depth_alone():
    plan = text.plan(seeds=3, workers=1)
    configs = {arm.name: arm.apply(plan.base).model for arm in plan.arms}
    plain, feedback = configs["plain, 2 layers"], configs["feedback, 2 layers"]
    assert feedback.feedback_window >= plain.context - 1  # each token sees the whole context before it
    assert feedback.feedback_block >= plain.context  # gradients go through all of it
    assert (feedback.layers, feedback.width, feedback.position) == (plain.layers, plain.width, plain.position)
    assert len(plan.seeds) == 3
