"""The tokenizer of generated data: a token a symbol, symbols with spaces between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.tokenizer import Tokenizer, Tokens
from clearhead.errors import unknown


class SymbolTokenizer(Tokenizer):
    """`decode(encode(text)) == text` for texts of its symbols with one space between; it refuses any other symbol."""

    kind = "symbols"

    def __init__(self, symbols: Sequence[str]) -> None:
        self.symbols = tuple(symbols)
        if len(set(self.symbols)) != len(self.symbols) or not all(s and not s.split()[1:] for s in self.symbols):
            raise ValueError(f"expected different symbols without spaces, got {self.symbols}")
        self.vocab_size = len(self.symbols) + 1
        self._ids = {symbol: i for i, symbol in enumerate(self.symbols)}

    def encode(self, text: str) -> Tokens:
        """Return the tokens of `text`. Raises `UserError` for a symbol that it does not have."""
        words = text.split()
        for word in words:
            if word not in self._ids:
                raise unknown("symbol", word, self.symbols)
        return np.asarray([self._ids[word] for word in words], dtype=np.int64)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, separator: str = "") -> str:
        """Return the symbols with spaces between them; a `separator` that is not empty stands as one more word."""
        parts = (" ".join(self.symbols[i] for i in part) for part in self._split_at_separators(ids))
        return (f" {separator} " if separator else " ").join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Return kind and symbols."""
        return {"kind": self.kind, "symbols": list(self.symbols)}
