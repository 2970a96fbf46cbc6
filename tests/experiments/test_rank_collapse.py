"""experiments/rank_collapse: scores get the strength asked for, both traces are listed alike, the counts add up."""

from __future__ import annotations

import pytest
from experiments.rank_collapse import initial, report, training


def test_stronger_queries_and_keys_make_scores_of_that_deviation():
    runs = {
        strength: initial.measure_one(initial.Job("scores", "Xavier, Pre-LN", 2, 0.1, 0, strength=strength))
        for strength in (1.0, 4.0)
    }
    first = {strength: run["measured"]["score_variance"][0] for strength, run in runs.items()}
    assert first[4.0] / first[1.0] == pytest.approx(16.0, rel=1e-3)
    assert runs[4.0]["measured"]["entropy"][0] < 0.6 < runs[1.0]["measured"]["entropy"][0]
    rows = report._scores(list(runs.values()))
    assert [row["strength"] for row in rows] == [1.0, 4.0]


def test_prediction_and_measurement_list_the_same_places():
    run = initial.measure_one(initial.Job("correlation", "Xavier, Post-LN", 6, 0.0, 0))
    assert len(run["measured"]["correlation"]) == len(run["predicted"]["correlation"]) == 7
    assert run["measured"]["correlation"][-1] > 0.8 > run["measured"]["correlation"][0]


def test_every_job_has_a_key_of_its_own():
    keys = [job.key for job in initial.jobs(2)]
    assert len(set(keys)) == len(keys)


def test_collapse_is_counted_by_run():
    rows = [{"collapse_predicted": [3, None, 2], "collapse_end": [4, 5, None]}]
    assert report.confusion(rows) == {
        "collapse": {"collapsed": 1, "not": 1},
        "no collapse": {"collapsed": 1, "not": 0},
    }
    assert report._collapsed([0.1, 0.99, 1.0]) == 1
    assert report._collapsed([0.1, 0.5]) is None


def test_strong_scores_reach_the_decoder_that_is_trained():
    from clearhead.models.make import build_model

    job = training.Job("Pre-LN, strong scores", 1e-3, 0, layers=2)
    model = build_model(training.config_of(job), 0)
    before = model.blocks[0].attention.query.weight.detach().clone()
    initial.strengthen(model, training.ARMS[job.arm].strength)
    assert model.blocks[0].attention.query.weight.detach() == pytest.approx(2.0 * before)
