"""experiments/long_memory: the task is what it says, arms differ in memory alone, the tables follow from the runs."""

from __future__ import annotations

import numpy as np
import pytest
from experiments.long_memory import recall, report, text
from experiments.long_memory.task import BUCKETS, IGNORE, KEYS, LIVE, REACH, VALUES, Recall, segments

from clearhead.models.decoder import Decoder


def test_every_answer_is_the_keys_last_value_and_nothing_else_is_asked():
    token, answer, distance = Recall(3, seed=0).read(3000)
    for row in range(3):
        written, live = {}, set()
        for place in range(1, 3000):
            now, before = int(token[row, place]), int(token[row, place - 1])
            if KEYS <= now < KEYS + VALUES:
                assert before < KEYS  # a value stands right behind its key
                assert before not in live
                written[before] = (now, place)
                live.add(before)
            live = {key for key in live if place - written[key][1] <= REACH}
            assert len(live) <= LIVE
            if now >= KEYS + VALUES:
                key = now - KEYS - VALUES
                assert key in live
                assert (int(answer[row, place]), int(distance[row, place])) == (
                    written[key][0],
                    place - written[key][1],
                )
                live.remove(key)
            else:
                assert answer[row, place] == IGNORE
    asked = distance[answer != IGNORE]
    assert BUCKETS[0][0] == asked.min()
    assert asked.max() <= REACH < recall.LONG
    assert all(((asked >= low) & (asked < high)).sum() > 20 for low, high in BUCKETS)


def test_streams_go_on_from_segment_to_segment_and_differ_by_seed():
    parts = segments(2, 7, seed=4)
    cut = [next(parts) for _ in range(3)]
    whole = Recall(2, seed=4).read(21)
    for index in range(3):
        np.testing.assert_array_equal(np.concatenate([part[index] for part in cut], axis=1), whole[index])
    assert (Recall(2, seed=5).read(21)[0] != whole[0]).any()


def test_arms_differ_in_memory_alone():
    for layers, layouts in recall.LAYOUTS.items():
        configs = [recall.config(recall.Job(layers, layout, "window", 0)).to_dict() for layout in layouts]
        assert len({config.pop("memory") for config in configs}) == len(layouts)
        assert all(config == configs[0] for config in configs)
    runs = [text.config(text.Job(arm, 1)).to_dict() for arm in text.ARMS]
    assert len({run["model"].pop("memory") for run in runs}) == len(text.ARMS)
    assert all(run == runs[0] for run in runs)


def test_a_model_that_knows_nothing_scores_like_chance():
    job = recall.Job(2, "last:1", "window", 0)
    model = Decoder(recall.config(job))
    right, asked = recall.score(model, seed=3)
    assert sum(right) / sum(asked) < 2 / VALUES
    assert asked[-1] > 300  # enough at the longest distances to tell 0.1 from 1


def run_of(layout: str, seed: int, accuracy: float) -> dict[str, object]:
    """A line as `recall.train` writes it."""
    return {
        "layers": 2, "layout": layout, "range": "window", "seed": seed, "steps": 400, "memory": layout,
        "bytes_per_stream": 2048, "accuracy": [accuracy] * len(BUCKETS), "asked": [10] * len(BUCKETS),
        "curve": [(50, 0.2), (100, accuracy)], "cpu_seconds": 1.0,
    }  # fmt: skip


def test_tables_and_figure_follow_from_the_runs():
    runs = [run_of("last:1", seed, right) for seed, right in enumerate((0.94, 0.96, 0.98))]
    found = report.recall([*runs, *(run_of("none", seed, 0.1) for seed in range(3))])
    assert [row["layout"] for row in found["rows"]] == ["none", "last:1"]
    mean, half = found["rows"][1]["accuracy"][0]
    assert mean == pytest.approx(0.96)
    assert half == pytest.approx(4.302653 * 0.02 / 3**0.5, rel=1e-5)  # Student's t of two degrees of freedom
    assert found["rows"][1]["learned_at"] == [100, 100, 100]
    assert found["rows"][0]["learned_at"] == [None, None, None]
    assert len(report.recall_table(found)) == 4
    assert report.figure(found).startswith("<svg")


def test_the_verdict_on_text_is_about_paired_seeds():
    def run(arm, seed, test):
        return {
            "arm": arm, "seed": seed, "test": test, "status": "finished", "memory": "", "bytes_per_stream": 1,
            "parameters": 1, "tokens": 1, "cpu_seconds": 1.0,
        }  # fmt: skip

    shift = {"none": 0.5, "full": 0.0, "last:1": -0.001, "last:1, low layers short": 0.001}
    noise = {"none": (0.01, 0.0, 0.02), "full": (0.0, 0.0, 0.0)}
    runs = [
        run(arm, seed, 2.0 + 0.3 * seed + more + noise.get(arm, (0.01, -0.01, 0.0))[seed])
        for arm, more in shift.items()
        for seed in range(3)
    ]
    verdicts = {one["arm"]: one["verdict"] for one in report.text(runs)["verdicts"]}
    assert verdicts == {
        "none": "worse",
        "last:1": "no difference shown at this size",
        "last:1, low layers short": "no difference shown at this size",
    }
