"""Tokenizers of sequences: a token a letter, or a token for every k letters.

With words of k letters the text is cut from its first letter on. A word that holds a letter outside the first `plain`
(an N), and the rest that is shorter than a word, are spelled letter by letter, so that the way back is exact. Which
letters share a token depends on where the text begins: a text that is shifted by one has other tokens throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.alphabets import Alphabet
from clearhead.data.tokenizer import Tokenizer, Tokens
from clearhead.errors import UserError


class LetterTokenizer(Tokenizer):
    """Ids: words of `alphabet.word` letters in the order of the alphabet, then single letters, then the separator.

    It reads the letters of its alphabet in upper case and nothing else, so its `decode(encode(text)) == text` holds for
    those texts alone.
    """

    def __init__(self, alphabet: Alphabet) -> None:
        self.alphabet = alphabet
        self.kind = alphabet.name
        self.vocab_size = alphabet.vocab_size
        letters = np.frombuffer(alphabet.letters.encode(), dtype=np.uint8)
        self._code = np.full(256, -1, dtype=np.int64)
        self._code[letters] = np.arange(len(letters))
        # What each id spells, padded with 0, and how long that is.
        k, n = alphabet.word, alphabet.words
        self._spelling = np.zeros((self.vocab_size, k), dtype=np.uint8)
        for place in range(k if n else 0):
            self._spelling[:n, place] = letters[np.arange(n) // alphabet.plain ** (k - 1 - place) % alphabet.plain]
        self._spelling[n:-1, 0] = letters

    def encode(self, text: str) -> Tokens:
        """Return the tokens of `text`. Raises `UserError` for a character that is not of the alphabet."""
        code = self._code[np.frombuffer(text.encode("utf-8", errors="replace"), dtype=np.uint8)]
        if (code < 0).any():
            place = next(i for i, letter in enumerate(text) if letter not in self.alphabet.letters)
            raise UserError(
                f"the tokenizer {self.kind!r} reads the letters {self.alphabet.letters} alone, got {text[place]!r} at "
                f"character {place + 1}; for other text take data.tokenizer=bytes"
            )
        k, n = self.alphabet.word, self.alphabet.words
        if k == 1:
            return code
        whole = len(code) // k * k
        letters_wk = code[:whole].reshape(-1, k)
        plain_w = np.asarray((letters_wk < self.alphabet.plain).all(axis=1))
        word_w = letters_wk @ self.alphabet.plain ** np.arange(k - 1, -1, -1)
        # Each word takes one place or, spelled, k of them.
        ids_wk = np.where(plain_w[:, None], word_w[:, None], letters_wk + n)
        kept_wk = ~plain_w[:, None] | (np.arange(k) == 0)
        return np.concatenate([ids_wk[kept_wk], code[whole:] + n])

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, separator: str = "") -> str:
        """Return the text of the tokens."""
        parts = []
        for part in self._split_at_separators(ids):
            spelled = self._spelling[part].reshape(-1)
            parts.append(spelled[spelled > 0].tobytes().decode())
        return separator.join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind alone: the alphabet is fixed."""
        return {"kind": self.kind}
