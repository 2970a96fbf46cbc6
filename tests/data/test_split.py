from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.data.config import DataConfig
from clearhead.data.split import GAP_BYTES, SPLITS, Piece, cut, plan_split
from clearhead.errors import UserError

SIZES = st.lists(st.integers(1, 50_000), min_size=1, max_size=60)


def total(plan, split):
    return sum(piece.stop - piece.start for piece in plan.pieces[split])


@settings(max_examples=200, deadline=None)
@given(sizes=SIZES, seed=st.integers(0, 50))
def test_no_byte_is_on_two_sides(sizes, seed):
    plan = plan_split(sizes, DataConfig(split_seed=seed))
    seen = {}
    for split in SPLITS:
        for piece in plan.pieces[split]:
            assert 0 <= piece.start < piece.stop <= sizes[piece.document]
            for start, stop in seen.get(piece.document, []):
                assert piece.start >= stop or piece.stop <= start
            seen.setdefault(piece.document, []).append((piece.start, piece.stop))
    if plan.by == "document":
        used = [piece.document for split in SPLITS for piece in plan.pieces[split]]
        assert sorted(used) == list(range(len(sizes)))
        assert all(plan.pieces[split] for split in SPLITS)


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(500, 1500), min_size=60, max_size=200), seed=st.integers(0, 20))
def test_many_documents_of_like_size_get_their_shares(sizes, seed):
    config = DataConfig(split_seed=seed, val_fraction=0.1, test_fraction=0.2)
    plan = plan_split(sizes, config)
    assert plan.by == "document"
    for split, share in (("test", 0.2), ("val", 0.1)):
        assert 0.75 * share <= total(plan, split) / sum(sizes) <= 1.3 * share


def test_a_split_is_decided_by_its_seed_alone():
    sizes = [1000 + 7 * i for i in range(80)]
    first = plan_split(sizes, DataConfig(split_seed=3))
    assert first == plan_split(sizes, DataConfig(split_seed=3, context=77, tokenizer="bpe"))
    assert first != plan_split(sizes, DataConfig(split_seed=4))


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [([9_000], "one document"), ([9_000, 9_000], "only 2 documents"), ([90_000, 5, 5], "too unequal")],
)
def test_too_few_documents_are_cut_by_position_with_a_gap(sizes, reason):
    plan = plan_split(sizes, DataConfig())
    assert plan.by == "position"
    assert reason in plan.how
    pieces = [plan.pieces[split][0] for split in SPLITS]
    gap = min(GAP_BYTES, sizes[0] // 100)
    for before, after in pairwise(pieces):
        assert after.start - before.stop == gap > 0
    assert pieces[0].start == 0
    assert pieces[-1].stop == sizes[0]


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, small=st.integers(1, 5_000), more=st.integers(0, 100_000))
def test_max_bytes_holds_and_a_smaller_run_reads_part_of_a_larger_one(sizes, small, more):
    less_text, more_text = (plan_split(sizes, DataConfig(max_bytes=n)) for n in (small, small + more))
    assert sum(total(less_text, split) for split in SPLITS) <= small
    for split in SPLITS:
        larger = {piece.document: piece for piece in more_text.pieces[split]}
        for piece in less_text.pieces[split]:
            assert piece.start == larger[piece.document].start
            assert piece.stop <= larger[piece.document].stop


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(alphabet="ab\n é日", max_size=400),
    borders=st.lists(st.integers(0, 1200), min_size=1, max_size=4).map(sorted),
)
def test_cuts_join_to_the_text_and_never_split_a_character(text, borders):
    data = text.encode()
    borders = [0, *(min(b, len(data)) for b in borders), len(data)]
    parts = [cut(data, Piece(0, start, stop)) for start, stop in pairwise(borders)]
    assert b"".join(parts) == data
    assert "".join(part.decode() for part in parts) == text


def test_a_cut_moves_to_the_next_line():
    data = b"".join(b"line %03d\n" % i for i in range(200))
    assert cut(data, Piece(0, 0, 905)).endswith(b"line 100\n")
    assert cut(data, Piece(0, 905, 1000)).startswith(b"line 101\n")


def test_no_text_is_an_error():
    with pytest.raises(UserError, match="no text"):
        plan_split([], DataConfig())
