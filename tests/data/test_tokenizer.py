import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.data import tokenizer as module
from clearhead.data.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from clearhead.errors import UserError

TEXT = (Path(__file__).parent / "fixtures/plays/tempest_act_1.txt").read_text()


@pytest.fixture(scope="module")
def bpe():
    return BPETokenizer.train([TEXT], 512)


@pytest.fixture(scope="module")
def spacious():
    """A tokenizer that has merged runs of white space, so that cutting one shows."""
    return BPETokenizer.train(["a \n\n\n  b\n\n\nc \n \t d" * 200], 300)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe):
    return ByteTokenizer() if request.param == "bytes" else bpe


ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)


@settings(max_examples=300, deadline=None)
@given(text=ANY_TEXT)
def test_the_way_back_is_exact(text, bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert tokenizer.decode(ids) == text
        assert tokenizer.separator not in ids


@pytest.mark.parametrize("text", ["", "\r\n \t  ", "<|endoftext|> [SEP]", "日本語 \U0001f600 \x00", "a\u0301 \u00a0"])
def test_awkward_texts(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_separators_are_shown_only_on_request(tokenizer):
    ids = [tokenizer.separator, *tokenizer.encode("one"), tokenizer.separator, *tokenizer.encode("two")]
    assert tokenizer.decode(ids) == "onetwo"
    assert tokenizer.decode(ids, separator="|") == "|one|two"


@pytest.mark.parametrize("bad", [-1, 10_000])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, bad):
    with pytest.raises(ValueError, match="token ids must lie in 0"):
        tokenizer.decode([0, bad])


def test_bytes_that_are_no_text_become_the_replacement_character():
    assert ByteTokenizer().decode([104, 0xFF, 105]) == "h\ufffdi"


def test_vocabulary_sizes(bpe):
    assert ByteTokenizer().vocab_size == 257
    assert bpe.vocab_size == 512
    assert bpe.separator == 511
    assert max(bpe.encode(TEXT)) < 511
    assert BPETokenizer.train(["ab"], 512).vocab_size == 257  # nothing to merge: an honest size


def test_bpe_shortens_text_like_that_it_learned_from(bpe):
    assert len(bpe.encode(TEXT)) < 0.6 * len(TEXT)


def test_training_twice_gives_the_same_tokenizer(bpe):
    assert BPETokenizer.train([TEXT], 512).to_dict() == bpe.to_dict()


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    again = load_tokenizer(tmp_path / "tokenizer.json")
    assert again.vocab_size == tokenizer.vocab_size
    assert np.array_equal(again.encode(TEXT), tokenizer.encode(TEXT))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", ["", "{}", '{"kind": "wordpiece"}', '{"kind": "bpe", "tokenizer": {"x": 1}}'])
def test_a_broken_file_is_one_clear_line(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(tmp_path / "t.json")
    with pytest.raises(UserError, match="no tokenizer at"):
        load_tokenizer(tmp_path / "absent.json")


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet="ab'\n \t.é", max_size=200), chunk=st.integers(1, 20))
def test_encoding_in_chunks_changes_no_token(text, chunk, spacious):
    bpe = spacious
    whole = bpe.encode(text)
    before, module._CHUNK = module._CHUNK, chunk
    try:
        assert np.array_equal(bpe.encode(text), whole)
    finally:
        module._CHUNK = before


def test_the_saved_file_is_plain_json(bpe, tmp_path):
    bpe.save(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["kind"] == "bpe"
