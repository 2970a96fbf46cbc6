import gzip
import json
import multiprocessing
import shutil
from pathlib import Path

import numpy as np
import pytest

from clearhead.data.config import DataConfig
from clearhead.data.split import SPLITS
from clearhead.data.text import IGNORE, prepare
from clearhead.errors import UserError


@pytest.fixture(params=["bytes", "bpe"])
def data(request, plays):
    return prepare(DataConfig(source=plays, tokenizer=request.param, vocab_size=400, context=64))


@pytest.fixture
def one_file(tmp_path):
    path = tmp_path / "my.txt"
    path.write_text("".join(f"This is line {i} of one long text.\n" for i in range(3000)))
    return path


def test_documents_hold_the_text_exactly(data, plays):
    original = {path.stem: path.read_bytes() for path in Path(plays).iterdir()}
    names = [document.name for split in SPLITS for document in data.documents(split)]
    assert sorted(names) == sorted(original)  # each document in one split, none lost
    for split in SPLITS:
        for document in data.documents(split):
            assert document.whole
            assert document.tokens[0] == data.tokenizer.separator
            # The denominator of bits per byte is the real text and nothing else.
            assert document.bytes == len(original[document.name])
            assert data.tokenizer.separator not in document.tokens[1:]
            assert data.tokenizer.decode(document.tokens[1:]).encode() == original[document.name]


def test_the_stream_is_the_documents_with_separators_between(data):
    for split in SPLITS:
        parts = [document.tokens for document in data.documents(split)]
        expected = np.concatenate([*parts, [data.tokenizer.separator]])
        assert np.array_equal(data.stream(split), expected)


def test_a_batch_is_a_pure_function_of_its_arguments(data, plays):
    first = data.batch("train", 4, 64, seed=3, step=17)
    list(zip(range(5), data.batches("train", 4, 64, seed=3)))  # reading other batches changes nothing
    again = prepare(data.config).batch("train", 4, 64, seed=3, step=17)
    resumed = next(data.batches("train", 4, 64, seed=3, start_step=17))
    for field in ("tokens", "targets", "segments"):
        assert np.array_equal(getattr(first, field), getattr(again, field))
        assert np.array_equal(getattr(first, field), getattr(resumed, field))
    for other in (
        data.batch("train", 4, 64, seed=4, step=17),
        data.batch("train", 4, 64, seed=3, step=18),
        data.batch("val", 4, 64, seed=3, step=17),
    ):
        assert not np.array_equal(first.tokens, other.tokens)


def test_targets_are_the_next_tokens_and_segments_number_the_documents(tmp_path):
    words = [f"document number {i}, " * (1 + i % 3) for i in range(200)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": word}) + "\n" for word in words))
    data = prepare(DataConfig(source=str(tmp_path / "x.jsonl"), context=128))
    separator = data.tokenizer.separator
    batch = data.batch("train", 64, 128, seed=0, step=0)
    assert batch.tokens.shape == batch.targets.shape == batch.segments.shape == (64, 128)
    assert batch.tokens.dtype == batch.targets.dtype == batch.segments.dtype == np.int64
    assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert (batch.segments[:, 0] == 0).all()
    # A new segment begins at a separator, and nowhere else.
    assert np.array_equal(np.diff(batch.segments, axis=1) == 1, batch.tokens[:, 1:] == separator)
    assert (batch.targets == separator).any()  # where a document ends is learned
    texts = {document.tokens.tobytes() for document in data.documents("train")}
    for row, segments in zip(batch.tokens, batch.segments):
        for number in range(1, segments[-1]):  # documents that lie whole in the window
            assert row[segments == number].astype("<u2").tobytes() in texts


def test_windows_reach_every_token_of_the_stream(tmp_path):
    (tmp_path / "x.txt").write_text("".join(map(chr, range(48, 123))) * 4)
    data = prepare(DataConfig(source=str(tmp_path), context=8))
    length = len(data.stream("train"))
    batch = data.batch("train", 5000, 8, seed=0, step=0)
    stream = data.stream("train").astype(np.int64)
    windows = {stream[start : start + 9].tobytes() for start in range(length - 8)}
    seen = {np.append(t, t[-1:]).tobytes() for t in batch.tokens}
    assert len({w[: 8 * 8] for w in windows}) == len({s[: 8 * 8] for s in seen})


def test_one_big_file_is_cut_by_position_and_says_so(one_file):
    data = prepare(DataConfig(source=str(one_file), context=64))
    assert data.summary["split"]["by"] == "position"
    assert "by position, because the source has one document" in " ".join(data.describe())
    text = one_file.read_text()
    parts = {split: data.tokenizer.decode(data.documents(split)[0].tokens[1:]) for split in SPLITS}
    assert [data.documents(split)[0].whole for split in SPLITS] == [False, False, True]
    places = [text.index(parts[split]) for split in SPLITS]
    assert places[0] == 0
    assert places[0] + len(parts["train"]) < places[1] < places[1] + len(parts["val"]) < places[2]
    assert all(part.startswith("This is line") for part in parts.values())


def test_the_end_of_a_cut_text_is_not_learned(tmp_path):
    (tmp_path / "x.txt").write_text("".join(f"line {i}\n" for i in range(60)))
    data = prepare(DataConfig(source=str(tmp_path), context=16))
    ends = {}
    for split in SPLITS:
        batch = data.batch(split, 5000, 16, seed=0, step=0)
        stream_end = batch.targets[np.isin(batch.targets, [data.tokenizer.separator, IGNORE])]
        ends[split] = set(stream_end.tolist())
    # Train and val stop in the middle of the document; only the test part ends where the document does.
    assert ends == {"train": {IGNORE}, "val": {IGNORE}, "test": {data.tokenizer.separator}}


def test_equal_documents_are_kept_once(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02d}.txt").write_text(f"text {i % 20}\nsecond line\n" * 30)
    (tmp_path / "crlf.txt").write_bytes(b"text 3\r\nsecond line\r\n" * 30 + b"\r\n")
    (tmp_path / "empty.txt").write_text(" \n")
    data = prepare(DataConfig(source=str(tmp_path), context=8))
    texts = [data.tokenizer.decode(d.tokens[1:]) for split in SPLITS for d in data.documents(split)]
    assert len(texts) == len(set(texts)) == 20
    notes = " ".join(data.summary["notes"])
    assert "left out: 1 empty document" in notes
    assert "left out: 21 documents with the same text as another" in notes


def test_bpe_learns_from_the_training_text_alone(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"only{chr(97 + i % 26) * (3 + i // 26)}here " * 200)
    data = prepare(DataConfig(source=str(tmp_path), tokenizer="bpe", vocab_size=2000, context=8))
    words = {s: [data.tokenizer.decode(d.tokens[1:]).split()[0] for d in data.documents(s)] for s in SPLITS}
    for split in SPLITS:
        known = [len(data.tokenizer.encode(" " + word)) == 1 for word in words[split]]
        assert all(known) if split == "train" else not any(known)


def test_the_fingerprint_follows_content_not_place(plays, tmp_path, one_file):
    shutil.copytree(plays, tmp_path / "copy")
    here, there = (prepare(DataConfig(source=str(s), context=64)) for s in (plays, tmp_path / "copy"))
    assert here.fingerprint == there.fingerprint
    prints = {
        here.fingerprint,
        prepare(DataConfig(source=plays, split_seed=1)).fingerprint,
        prepare(DataConfig(source=plays, tokenizer="bpe", vocab_size=300)).fingerprint,
        prepare(DataConfig(source=str(one_file))).fingerprint,
    }
    assert len(prints) == 4
    assert prepare(DataConfig(source=plays, context=32)).fingerprint == here.fingerprint


def test_edited_text_is_prepared_anew(one_file):
    config = DataConfig(source=str(one_file))
    first = prepare(config).fingerprint
    one_file.write_text(one_file.read_text() + "one more line\n")
    assert prepare(config).fingerprint != first


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no text in .*my.txt: it is empty"),
        (" \n\n", "no text in .*my.txt: it is empty"),
        ("short", "too little text in .*my.txt: its train split has . tokens, a context of 256 needs 257"),
        ("x " * 1000, "too little text in .*my.txt: its val split has 18. tokens, a context of 256 needs 257"),
    ],
)
def test_too_little_text_is_one_clear_line(tmp_path, content, message):
    (tmp_path / "my.txt").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        prepare(DataConfig(source=str(tmp_path / "my.txt")))
    assert "\n" not in str(caught.value)


def test_wrong_calls_are_refused(data):
    with pytest.raises(UserError, match=r"unknown split 'vall' .did you mean 'val'"):
        data.documents("vall")
    with pytest.raises(UserError, match="too little text"):
        data.batch("val", 1, 10_000_000, seed=0, step=0)
    with pytest.raises(ValueError, match="seed >= 0"):
        data.batch("val", 1, 8, seed=-1, step=0)


def test_a_packed_source_gives_the_same_tokens(tmp_path, one_file):
    packed = tmp_path / "packed" / "my.txt.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(one_file.read_bytes()))
    fingerprints = {prepare(DataConfig(source=str(path))).fingerprint for path in (one_file, packed)}
    assert len(fingerprints) == 1


def _prepare_in_a_process(source, results):
    data = prepare(DataConfig(source=source, tokenizer="bpe", vocab_size=300, context=64))
    results.put((data.fingerprint, int(data.batch("train", 2, 64, seed=0, step=0).tokens.sum())))


def test_processes_that_prepare_at_once_agree(plays, data_folder):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [context.Process(target=_prepare_in_a_process, args=(plays, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    answers = [results.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join(timeout=60)
    assert len(set(answers)) == 1
    kept = [path.name for path in (data_folder / "prepared").iterdir()]
    assert len(kept) == 2  # the prepared folder and the request notes, nothing temporary
    assert not [name for name in kept if name.startswith(".tmp")]
