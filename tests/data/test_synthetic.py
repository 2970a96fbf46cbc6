"""Generated tasks against solvers that read their text: the answer follows from the text, and from the right place."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data import synthetic_solvers as solvers

from clearhead.data.config import DataConfig
from clearhead.data.synthetic.catalogue import TASKS, describe, parse
from clearhead.data.synthetic.source import SyntheticData
from clearhead.errors import UserError

CASES = {
    "needle": {},
    "needle,facts=5,asks=3": {},
    "needle,keys=0,values=8,words=4": {},
    "needle,facts=2,reader=middle,away=7,edge=3": {},
    "copy": {},
    "copy,gap=9,order=reverse,letters=2": {"order": "reverse"},
    "recall,pairs=3": {},
    "recall,pairs=8,keys=8,values=2": {},
    "two-step": {},
    "two-step,keys=3,live=2,ask=0.1": {},
    "two-step,keys=3,live=1,ask=0.95": {},
    "state": {},
    "state,states=7,sets=0.3": {"states": 7},
    "furthest": {},
    "furthest,points=5": {"points": 5},
    "programs": {},
    "programs,variables=5,largest=3": {"largest": 3},
}
SPLITS = ("train", "val", "test")


def solve(source, words, both_ways):
    name = source.split(",")[0].replace("-", "_")
    return getattr(solvers, name)(words, both_ways, **CASES[source])


def data_of(source, context=64):
    return SyntheticData(DataConfig(source=f"synthetic:{source}", context=context))


@given(st.sampled_from(list(CASES)), st.integers(0, 80), st.sampled_from(SPLITS), st.integers(0, 10**6), st.booleans())
@settings(max_examples=400, deadline=None)
def test_the_text_gives_every_answer_and_nothing_else_is_asked(source, more, split, index, both_ways):
    data = data_of(source, 128)
    length = data.task.least() + more
    sample = data.sample(split, index, length=length, both_ways=both_ways)
    symbols = data.tokenizer.symbols
    assert sample.tokens.shape == sample.targets.shape == sample.distance.shape == (length,)
    assert sample.tokens.dtype == sample.targets.dtype == np.int64
    words = data.tokenizer.decode(sample.tokens).split(" ")
    assert data.tokenizer.encode(" ".join(words)).tolist() == sample.tokens.tolist()
    asked = {i: symbols[t] for i, t in enumerate(sample.targets) if t != -100}
    assert asked == solve(source, words, both_ways)
    assert asked
    assert all((sample.distance[i] >= 0) == (i in asked) for i in range(length))


@given(st.sampled_from(list(CASES)), st.integers(0, 10**6), st.booleans())
@settings(max_examples=200, deadline=None)
def test_the_distance_leads_to_what_decides(source, index, both_ways):
    data = data_of(source)
    sample = data.sample("train", index, length=max(64, data.task.least()), both_ways=both_ways)
    words = data.tokenizer.decode(sample.tokens).split(" ")
    for i in np.flatnonzero(sample.targets != -100):
        there = [words[i - sample.distance[i]]]
        if both_ways and data.task.name in ("needle", "furthest") and i + sample.distance[i] < len(words):
            there.append(words[i + sample.distance[i]])  # on which side is not said
        answer = data.tokenizer.symbols[sample.targets[i]]
        if data.task.name == "state":
            assert there[0][0] == "="
            assert not any(w[0] == "=" for w in words[i - sample.distance[i] + 1 : i + 1])
        elif data.task.name == "programs":
            assert there == [";"]
        else:
            assert answer in there


@pytest.mark.parametrize("source", ["needle,facts=3,asks=2", "needle,keys=0", "recall", "two-step"])
def test_values_stand_in_facts_alone(source):
    """An answer can be read at its fact and nowhere else: no value is shown twice, and none beside a question."""
    data = data_of(source)
    for index in range(50):
        words = data.tokenizer.decode(data.sample("val", index).tokens).split(" ")
        values = [i for i, word in enumerate(words) if word[0] == "v"]
        facts = {"needle": getattr(data.task, "facts", 0), "recall": 8}.get(data.task.name)
        if facts is not None:
            assert len(values) == facts
        else:
            assert all(words[i - 1][0] == "k" for i in values)


def test_copies_are_not_in_sight_of_a_model_that_looks_both_ways():
    data = data_of("copy")
    sample = data.sample("train", 0, both_ways=True)
    asked = sample.targets != -100
    assert {data.tokenizer.symbols[t] for t in sample.tokens[asked]} == {"_"}


@pytest.mark.parametrize("both_ways", [False, True])
def test_needles_keep_away(both_ways):
    data = data_of("needle,reader=middle,away=10,edge=6", 63)
    sides = set()
    for index in range(200):
        words = data.tokenizer.decode(data.sample("train", index, both_ways=both_ways).tokens).split(" ")
        question, key = words.index("?"), next(i for i, w in enumerate(words) if w[0] == "v") - 1
        assert question == (63 - 2) // 2
        assert 6 <= key < 63 - 6 - 1
        assert question - (key + 2) >= 10 or key - (question + 2) >= 10
        sides.add(key > question)
    assert sides == ({False, True} if both_ways else {False})


def test_needles_lie_everywhere():
    data = data_of("needle", 34)
    depth = [int(data.sample("train", i).distance.max()) for i in range(1500)]
    counts = np.bincount(depth, minlength=34)[2:33]
    assert (counts > 0).all()  # every place that the length allows
    assert counts[1:-1].max() < 3 * counts[1:-1].min() + 20  # and about evenly


@pytest.mark.parametrize("name", list(TASKS))
def test_a_sequence_is_a_function_of_seed_split_and_index(name):
    one, other = data_of(name), data_of(name)
    first = one.batch("train", 4, 64, seed=3, step=2)
    for i in range(30):  # what was drawn before is all one
        other.sample("train", i, seed=3)
    again = other.rows("train", range(8, 12), 64, seed=3)
    assert all(np.array_equal(getattr(first, part), getattr(again, part)) for part in ("tokens", "targets", "distance"))
    split_batch = [other.batch("train", 2, 64, seed=3, step=step).tokens for step in (4, 5)]
    assert np.array_equal(first.tokens, np.concatenate(split_batch))
    assert not np.array_equal(first.tokens, one.batch("train", 4, 64, seed=4, step=2).tokens)
    val, test = (one.rows(split, range(8, 12), 64, seed=3).tokens for split in ("val", "test"))
    assert not np.array_equal(val, test)
    assert not np.array_equal(val, first.tokens)
    assert np.array_equal(val, one.rows("val", range(8, 12), 64, seed=99).tokens)  # every run meets the same


def test_fingerprints_tell_data_apart():
    prints = [data_of(source).fingerprint for source in CASES]
    assert len(set(prints)) == len(prints)
    assert data_of("needle").fingerprint == data_of("needle,facts=1").fingerprint  # a default may be said


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("needl", "did you mean 'needle'"),
        ("needle,fact=2", "did you mean 'facts'"),
        ("needle,facts", "expected option=value"),
        ("needle,facts=2,facts=3", "given twice"),
        ("needle,facts=two", "facts: expected a whole number, got 'two'"),
        ("needle,facts=17", "facts: expected at most keys=16"),
        ("needle,asks=2", "asks: expected at most facts=1"),
        ("needle,reader=start", "reader: expected end or middle"),
        ("needle,values=1", "values: expected at least 2"),
        ("needle,sequences=0", "sequences: expected at least 1"),
        ("needle,away=62", "needs at least"),
        ("copy,gap=62", "needs at least 65 tokens, got 64"),
        ("recall,pairs=33", "pairs: expected at most keys=32"),
        ("recall,pairs=22", "needs at least 66 tokens, got 64"),
        ("two-step,live=25", "live: expected at most keys=24"),
        ("two-step,ask=1", "ask: expected a share between 0 and 1"),
        ("two-step,ask=nan", "ask: expected a finite number"),
        ("two-step,length=100", "length: expected a multiple of the context 64"),
        ("state,sets=0", "sets: expected a share"),
        ("furthest,points=2", "points: expected at least 3"),
        ("programs,variables=0", "variables: expected at least 1"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_line(source, words):
    with pytest.raises(UserError, match=words) as caught:
        DataConfig(source=f"synthetic:{source}", context=64)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", list(CASES))
@pytest.mark.parametrize("both_ways", [False, True])
def test_the_least_length_holds_the_task_and_no_shorter_one_is_taken(source, both_ways):
    data = data_of(source, 128)
    least = data.task.least()
    for index in range(20):
        assert (data.sample("train", index, length=least, both_ways=both_ways).targets != -100).any()
    with pytest.raises(UserError, match="needs at least"):
        data.sample("train", 0, length=least - 1)


def test_other_options_of_text_are_refused():
    with pytest.raises(UserError, match=r"leave data.tokenizer"):
        DataConfig(source="synthetic:needle", tokenizer="bpe")
    with pytest.raises(UserError, match=r"data.max_bytes"):
        DataConfig(source="synthetic:needle", max_bytes=10)


@pytest.mark.parametrize("name", list(TASKS))
def test_64k_tokens_are_drawn(name):
    data = data_of(name)
    sample = data.sample("test", 0, length=65_536)
    assert sample.tokens.shape == (65_536,)
    words = data.tokenizer.decode(sample.tokens).split(" ")
    if name != "furthest":  # its solver is quadratic
        solved = solve(name if name in CASES else f"{name},pairs=3", words, False)
        assert solved == {i: data.tokenizer.symbols[t] for i, t in enumerate(sample.targets) if t != -100}


def test_every_task_is_listed_with_its_options():
    lines = describe()
    assert len(lines) == len(TASKS)
    for line in lines:
        parse(line.splitlines()[0])  # as it is printed, it is read


# ---- for models with a memory ----


@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_lanes_read_whole_sequences_part_by_part(rows, parts, seed):
    context = 8
    data = data_of(f"state,sets=0.5,length={parts * context}", context)
    steps = [data.lanes("train", rows, context, seed, step) for step in range(3 * parts)]
    for row in range(rows):
        ahead = row * parts // rows
        for step, (batch, number_b) in enumerate(steps):
            number, part = divmod(step + ahead, parts)
            whole = data.sample("train", number * rows + row, seed=seed)
            here = slice(part * context, (part + 1) * context)
            assert number_b[row] == number
            assert np.array_equal(batch.tokens[row], whole.tokens[here])
            met = number or not ahead  # the beginning of the others was never read
            assert np.array_equal(batch.targets[row], whole.targets[here] if met else np.full(context, -100))
    other = data_of(f"state,sets=0.5,length={parts * context}", context)
    again = other.lanes("train", rows, context, seed, 2 * parts - 1)  # from the middle: resuming needs the step alone
    assert np.array_equal(again[0].tokens, steps[2 * parts - 1][0].tokens)
