import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.data.alphabets import ALPHABETS
from clearhead.data.config import DataConfig
from clearhead.data.letters import LetterTokenizer
from clearhead.data.tokenizer import load_tokenizer
from clearhead.errors import UserError

NAMES = list(ALPHABETS)


@st.composite
def texts(draw):
    alphabet = ALPHABETS[draw(st.sampled_from(NAMES))]
    return alphabet, draw(st.text(alphabet=alphabet.letters, max_size=40))


@given(texts())
@settings(max_examples=150, deadline=None)
def test_the_way_back_is_exact_and_words_are_what_they_spell(case):
    alphabet, text = case
    tokenizer = LetterTokenizer(alphabet)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.int64
    assert all(0 <= i < tokenizer.separator for i in ids)
    k = alphabet.word
    expected = []  # spelled out again: by words from the first letter on, by letters where a word does not fit
    for start in range(0, len(text), k):
        word = text[start : start + k]
        if k > 1 and len(word) == k and all(letter in alphabet.letters[: alphabet.plain] for letter in word):
            number = 0
            for letter in word:
                number = number * alphabet.plain + alphabet.letters.index(letter)
            expected.append(number)
        else:
            expected += [alphabet.words + alphabet.letters.index(letter) for letter in word]
    assert ids.tolist() == expected


@pytest.mark.parametrize(("name", "ids"), [("dna", 6), ("dna3", 64 + 6), ("dna6", 4096 + 6), ("protein", 26)])
def test_sizes(name, ids, tmp_path):
    tokenizer = LetterTokenizer(ALPHABETS[name])
    assert tokenizer.vocab_size == ids == DataConfig(tokenizer=name).ids
    tokenizer.save(tmp_path / "t.json")
    again = load_tokenizer(tmp_path / "t.json")
    assert (again.kind, again.vocab_size) == (name, ids)
    assert again.decode(again.encode("ACC")) == "ACC"


def test_separators_part_texts():
    tokenizer = LetterTokenizer(ALPHABETS["dna3"])
    ids = [tokenizer.separator, *tokenizer.encode("ACGTN"), tokenizer.separator, *tokenizer.encode("T")]
    assert tokenizer.decode(ids, separator="|") == "|ACGTN|T"


@pytest.mark.parametrize("text", ["ACGU", "acgt", "AC GT", "ACÄ", "AC\n"])
def test_other_characters_are_refused_by_name_and_place(text):
    with pytest.raises(UserError, match=r"'dna' reads the letters ACGTN alone, got .* at character [1-4]; .*bytes"):
        LetterTokenizer(ALPHABETS["dna"]).encode(text)
