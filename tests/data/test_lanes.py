"""Lanes: rows that go on where they stopped."""

from __future__ import annotations

import numpy as np
import pytest

from clearhead.data.config import DataConfig
from clearhead.data.lanes import lane_starts
from clearhead.data.text import IGNORE, prepare


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path / "prepared"))
    folder = tmp_path / "text"
    folder.mkdir()
    draw = np.random.default_rng(3)
    for number in range(12):
        words = draw.integers(97, 123, size=40 + 17 * number).astype(np.uint8).tobytes()
        (folder / f"{number:02}.txt").write_bytes(words)
    return prepare(DataConfig(source=str(folder), context=16, val_fraction=0.2, test_fraction=0.2))


def test_rows_go_on_where_they_stopped_and_cover_the_stream(data):
    stream = np.asarray(data.stream("train"), dtype=np.int64)
    circle, rows = len(stream) - 1, 3
    steps = -(-circle // 16) + 2  # more than once round
    batches = [data.lanes("train", rows, 16, 5, step) for step in range(steps)]
    tokens = np.concatenate([batch.tokens for batch in batches], axis=1)
    targets = np.concatenate([batch.targets for batch in batches], axis=1)
    for row, start in enumerate(lane_starts(circle, rows, 5)):
        index = (start + np.arange(tokens.shape[1])) % circle
        assert np.array_equal(tokens[row], stream[index])
        told = targets[row] != IGNORE
        assert told.mean() > 0.95
        assert np.array_equal(targets[row][told], stream[index + 1][told])
    assert np.array_equal(np.sort(lane_starts(circle, rows, 5)), lane_starts(circle, rows, 5))


def test_documents_keep_their_number_from_step_to_step(data):
    batches = [data.lanes("train", 2, 16, 0, step) for step in range(60)]
    tokens = np.concatenate([batch.tokens for batch in batches], axis=1)
    segments = np.concatenate([batch.segments for batch in batches], axis=1)
    opens = tokens[:, 1:] == data.tokenizer.separator
    assert opens.any()
    assert np.array_equal(segments[:, 1:] - segments[:, :-1], opens.astype(np.int64))


def test_a_batch_is_a_function_of_seed_and_step(data):
    one, two = (data.lanes("train", 4, 16, 7, 9) for _ in range(2))
    assert np.array_equal(one.tokens, two.tokens)
    assert not np.array_equal(one.tokens, data.lanes("train", 4, 16, 8, 9).tokens)
    with pytest.raises(ValueError, match="step >= 0"):
        data.lanes("train", 4, 16, 8, -1)
