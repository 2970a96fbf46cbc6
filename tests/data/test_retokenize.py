import numpy as np
import pytest

from clearhead.data.config import DataConfig
from clearhead.data.retokenize import documents_for
from clearhead.data.text import prepare
from clearhead.data.tokenizer import ByteTokenizer
from clearhead.errors import UserError


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_a_runs_own_text_comes_back_as_it_was_trained_on(plays, tokenizer):
    config = DataConfig(source=plays, tokenizer=tokenizer, vocab_size=400, context=64)
    data = prepare(config)
    for split in ("train", "val", "test"):
        found = documents_for(data.tokenizer, config, split).documents(split)
        assert [d.name for d in found] == [d.name for d in data.documents(split)]
        for mine, theirs in zip(found, data.documents(split), strict=True):
            assert np.array_equal(mine.tokens, theirs.tokens)
            assert mine.bytes == theirs.bytes


def test_other_text_is_read_with_the_given_tokenizer(plays, tmp_path):
    data = prepare(DataConfig(source=plays, tokenizer="bpe", vocab_size=400, context=64))
    for i in range(10):
        (tmp_path / f"{i}.txt").write_text(f"Où est {i} ? The quick brown fox. " * 20)
    other = DataConfig(source=str(tmp_path), tokenizer="bpe", vocab_size=400, context=16)
    found = documents_for(data.tokenizer, other, "all").documents("all")
    assert len(found) == 10
    for document in found:
        assert data.tokenizer.decode(document.tokens[1:]).encode() == (tmp_path / f"{document.name}.txt").read_bytes()


def test_unknown_splits_are_refused(plays):
    with pytest.raises(UserError, match=r"unknown split 'tset' .did you mean 'test'"):
        documents_for(ByteTokenizer(), DataConfig(source=plays, context=64), "tset")
