"""The made corpus of the BMI experiment is what it says, and its verdicts point the right way."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from experiments.bmi import report, runs
from experiments.bmi.topics import Corpus, best_nats, information, symbol_law, write_corpus

SMALL = Corpus(documents=300, segments=4, length=20, topics=3, symbols=20, own=5)


def texts(path):
    return [json.loads(line)["text"] for line in path.read_text().splitlines()]


def likeness(path, corpus):
    """How much more alike two segments of a document are than segments of different documents: shared symbols."""
    cut = [[t[i : i + corpus.length] for i in range(0, len(t), corpus.length)] for t in texts(path)]
    shared = lambda a, b: sum((Counter(a) & Counter(b)).values()) / corpus.length
    own = np.mean([shared(d[0], d[1]) for d in cut])
    apart = np.mean([shared(a[0], b[1]) for a, b in pairwise(cut)])
    return own - apart


def test_segments_of_a_document_are_alike_and_shuffled_ones_are_not(tmp_path):
    for shuffled in (False, True):
        write_corpus(tmp_path / f"{shuffled}", SMALL, 3, shuffled=shuffled)
    assert all(len(text) == 80 for text in texts(tmp_path / "True"))
    assert likeness(tmp_path / "False", SMALL) > 0.1
    assert abs(likeness(tmp_path / "True", SMALL)) < 0.05
    write_corpus(tmp_path / "again", SMALL, 3, shuffled=False)
    assert (tmp_path / "again").read_text() == (tmp_path / "False").read_text()


def test_floors_are_those_of_the_law():
    law = symbol_law(SMALL, 3)
    assert law.sum(axis=1) == pytest.approx(np.ones(3))
    entropy = float(-(law * np.log(law)).sum(axis=1).mean())
    mixed = law.mean(axis=0)
    known, unknown = (best_nats(SMALL, 3, shuffled=s, tokens=1, draws=4000) for s in (False, True))
    assert unknown == pytest.approx(float(-(mixed * np.log(mixed)).sum()), abs=0.05)
    assert entropy - 0.05 < known < unknown  # twenty symbols all but say the topic
    assert 0.8 * math.log(3) < information(SMALL, 3, draws=500) <= math.log(3) + 0.03


def test_verdicts_know_which_way_is_better():
    def run(arm, seed, shift):
        found = dict.fromkeys(("mean_score", "info_nce", "donsker_varadhan"), 0.1)
        return {
            "corpus": "topics", "arm": arm, "seed": seed, "status": "finished", "steps": 10, "tokens": 100,
            "extra_tokens_per_step": 0, "curve": [[1, 5.0]], "cpu_seconds": 1.0, "own_critic_accuracy": None,
            "effective_pairs": [], "first_nats": 3.0 - shift, "test_bits_per_byte": 4.0 + shift,
            "information": {"accuracy": 0.5 + shift / 9, "nwj": 0.1 - shift / 9, "pairs": 9, **found},
        }  # fmt: skip

    made = [run(runs.PLAIN, seed, 0.001 * seed) for seed in range(4)]
    made += [run("BMI-base 0.1", seed, 0.5 + 0.002 * seed * seed) for seed in range(4)]
    verdicts = {row["quantity"]: row["verdict"] for row in report.results(made)["differences"]}
    assert verdicts == {"first": "better", "bits": "worse", "accuracy": "better", "nwj": "worse"}


def test_the_longer_plain_run_pays_for_the_segments():
    setting = runs.QUICK
    plain, dear = (runs.dearer(setting, "shakespeare", objective) for objective in ({}, {"nsp": 0.1}))
    assert plain == 1.0
    assert 1.2 < dear < 2.0
    assert runs.dearer(setting, "shakespeare", {"nsp": 0.1, "nsp_trains": "critic"}) < dear
