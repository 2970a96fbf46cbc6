"""Segments and pairs: what is drawn, with which probability, and never across documents."""

from __future__ import annotations

import numpy as np
import pytest

from clearhead.data.tokenizer import ByteTokenizer
from clearhead.errors import UserError
from clearhead.objectives.bmi.segments import cut_documents, draw_ahead, log_ahead, other_than


def documents(*sizes):
    """Every token says its document and its place: document * 1000 + place."""
    return [1000 * d + np.arange(n) for d, n in enumerate(sizes)]


def test_chunks_cover_each_document_and_stay_inside_it():
    segments = cut_documents(documents(25, 7, 30), "chunk:10")
    assert segments.length.tolist() == [10, 10, 5, 7, 10, 10, 10]
    assert segments.document.tolist() == [0, 0, 0, 1, 2, 2, 2]
    read = segments.read(np.arange(len(segments)))
    texts = [row[:n] for row, n in zip(read.tokens, read.lengths)]
    assert np.array_equal(np.concatenate(texts), np.concatenate(documents(25, 7, 30)))
    assert segments.leading.tolist() == [0, 1, 4, 5]  # the lone segment of document 1 has no next one
    assert read.valid.sum(axis=1).tolist() == read.lengths.tolist()


def test_no_pair_crosses_a_document_and_every_pair_is_what_it_says():
    segments = cut_documents(documents(95, 33, 20, 4), "chunk:10")
    for step in range(40):
        pairs = segments.draw(16, lookahead=0.3, seed=1, step=step)
        starts = {name: getattr(pairs, name).tokens[:, 0] for name in ("first", "next", "other", "later")}
        assert np.array_equal(starts["next"], starts["first"] + 10)  # the same document, one chunk on
        assert np.array_equal(starts["later"] // 1000, starts["first"] // 1000)
        ahead = starts["later"] - starts["next"]
        assert (ahead >= 0).all()
        assert (ahead % 10 == 0).all()
        assert (starts["other"] != starts["first"]).all()
        assert (starts["other"] != starts["next"]).all()
        k, most = ahead // 10, segments.behind[pairs.index] - 1
        assert np.allclose(pairs.log_q, log_ahead(k, most, 0.3))


def test_a_step_is_a_pure_function_of_seed_and_step():
    segments = cut_documents(documents(300, 200), "chunk:10")
    again = cut_documents(documents(300, 200), "chunk:10")
    a, b = (s.draw(8, lookahead=0.3, seed=5, step=7) for s in (segments, again))
    assert np.array_equal(a.other.tokens, b.other.tokens)
    assert np.array_equal(a.later.tokens, b.later.tokens)
    for other in ({"seed": 6, "step": 7}, {"seed": 5, "step": 8}):
        c = segments.draw(8, lookahead=0.3, **other)
        assert not np.array_equal(a.index, c.index)


@pytest.mark.parametrize("p", [0.05, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("most", [0, 1, 5, 400])
def test_the_law_is_a_geometric_one_cut_off_and_renormalised(p, most):
    k = np.arange(most + 1)
    q = np.exp(log_ahead(k, np.full_like(k, most), p))
    plain = p * (1 - p) ** k
    assert q.sum() == pytest.approx(1.0, abs=1e-12)
    assert np.allclose(q, plain / plain.sum(), rtol=1e-9)


def test_draws_follow_the_law_at_every_distance():
    """10,000 draws with room for six: within 4.5 standard errors of q, the last one too (clipping would triple it)."""
    n, most, p = 10_000, 5, 0.3
    k, log_q = draw_ahead(np.full(n, most), p, np.random.default_rng(0))
    expected = np.exp(log_ahead(np.arange(most + 1), np.full(most + 1, most), p))
    seen = np.bincount(k, minlength=most + 1) / n
    assert (np.abs(seen - expected) < 4.5 * np.sqrt(expected * (1 - expected) / n)).all()
    assert np.allclose(np.exp(log_q), expected[k])
    assert (draw_ahead(np.zeros(50, dtype=np.int64), p, np.random.default_rng(0))[0] == 0).all()


def test_others_are_uniform_over_all_but_the_two():
    index = np.full(12_000, 3)
    drawn = other_than(index, 8, np.random.default_rng(0))
    counts = np.bincount(drawn, minlength=8)
    assert counts[3] == counts[4] == 0
    assert (np.abs(counts[[0, 1, 2, 5, 6, 7]] / 12_000 - 1 / 6) < 4.5 * np.sqrt(5 / 36 / 12_000)).all()


def test_sentences_end_where_they_end():
    tokenizer = ByteTokenizer()
    text = "A dog ran. Was it?! ... No.\n\nYes, it was a dog and it ran for quite a while. End"
    segments = cut_documents([tokenizer.encode(text)], "sentence:30", tokenizer=tokenizer)
    read = segments.read(np.arange(len(segments)))
    found = [tokenizer.decode(row[:n]) for row, n in zip(read.tokens, read.lengths)]
    assert found[:3] == ["A dog ran.", " Was it?!", " ..."]
    assert found[-2] == "\n\nYes, it was a dog and it ran for"[:30]  # clipped, the rest is left out
    assert found[-1] == " End"


@pytest.mark.parametrize(
    ("sizes", "cut", "message"),
    [
        ((5, 5), "chunk:10", "none of the 2 documents has two segments"),
        ((20,), "chunk:10", "a third segment is needed"),
        ((20,), "chunks:10", "did you mean 'chunk'"),
        ((20,), "chunk:0", "at least 1"),
        ((20,), "chunk", "expected chunk:N"),
    ],
)
def test_what_cannot_be_paired_is_refused(sizes, cut, message):
    with pytest.raises(UserError, match=message):
        cut_documents(documents(*sizes), cut).draw(2, lookahead=0.3, seed=0, step=0)
