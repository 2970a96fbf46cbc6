"""Text to tokens and back, exactly: bytes, or byte pairs learned from the training text.

Both have one id more than their alphabet: the separator, always the last id. It stands before every
document (where it also says that the one before has ended) and comes out of no text: `encode` never yields
it. (The tokenizer of a pretrained model, `pretrained_tokenizer.py`, has a separator of its own.)
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.alphabets import ALPHABETS
from clearhead.data.cache import write_json
from clearhead.errors import UserError

Tokens = npt.NDArray[np.int64]

_CHUNK = 1 << 20  # characters that are encoded at once


class Tokenizer(ABC):
    """What every tokenizer offers. `decode(encode(text)) == text` for every text that UTF-8 can hold.

    Tokenizers of sequences and of generated data hold to that for texts of their own alphabet, and refuse others.
    """

    kind: str
    vocab_size: int
    """Number of ids, the separator included."""

    @property
    def separator(self) -> int:
        """Return the id that stands before every document: the last one, unless the tokenizer has its own."""
        return self.vocab_size - 1

    @abstractmethod
    def encode(self, text: str) -> Tokens:
        """Return the tokens of `text`, [n] int64, without a separator."""

    @abstractmethod
    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, separator: str = "") -> str:
        """Return the text of `ids` ([n]); each separator becomes `separator`.

        A model can produce bytes that are not UTF-8: they become U+FFFD. Ids outside the vocabulary raise
        ValueError.
        """

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return what `save` writes."""

    def save(self, path: Path | str) -> None:
        """Write the tokenizer as one JSON file (under a temporary name first)."""
        write_json(Path(path), self.to_dict())

    def _split_at_separators(self, ids: Sequence[int] | npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        array = np.asarray(ids, dtype=np.int64).reshape(-1)
        if array.size and not 0 <= int(array.min()) <= int(array.max()) < self.vocab_size:
            raise ValueError(f"token ids must lie in 0..{self.vocab_size - 1}, got {array.min()}..{array.max()}")
        marks = np.flatnonzero(array == self.separator)
        return [part[1:] if i else part for i, part in enumerate(np.split(array, marks))]


class ByteTokenizer(Tokenizer):
    """One token per UTF-8 byte: 256 ids and the separator, 257 in all."""

    kind = "bytes"
    vocab_size = 257

    def encode(self, text: str) -> Tokens:
        """Return the UTF-8 bytes of `text`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, separator: str = "") -> str:
        """Return the text of the bytes."""
        parts = self._split_at_separators(ids)
        return separator.join(part.astype(np.uint8).tobytes().decode(errors="replace") for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind alone: bytes have nothing to learn."""
        return {"kind": self.kind}


class BPETokenizer(Tokenizer):
    """Byte-level byte-pair encoding by the `tokenizers` library (Sennrich et al. 2016; GPT-2's word pattern).

    All 256 bytes are in the alphabet, so every text has tokens and the way back is exact.
    """

    kind = "bpe"

    def __init__(self, state: str) -> None:
        from tokenizers import Tokenizer as Library

        self._library = Library.from_str(state)
        self.vocab_size = self._library.get_vocab_size() + 1

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """Learn at most `vocab_size` ids, separator included, from `texts`; a short text gives fewer."""
        from tokenizers import Tokenizer as Library
        from tokenizers import decoders, models, pre_tokenizers, trainers

        library = Library(models.BPE())
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size - 1,
            min_frequency=2,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator((chunk for text in texts for chunk in text_chunks(text)), trainer=trainer)
        return cls(library.to_str())

    def encode(self, text: str) -> Tokens:
        """Return the tokens of `text`."""
        parts = [self._library.encode(chunk, add_special_tokens=False).ids for chunk in text_chunks(text)]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts] or [np.zeros(0, np.int64)])

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, separator: str = "") -> str:
        """Return the text of the tokens."""
        parts = self._split_at_separators(ids)
        return separator.join(self._library.decode(part.tolist(), skip_special_tokens=False) for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind and the library's own JSON."""
        return {"kind": self.kind, "tokenizer": json.loads(self._library.to_str())}


def load_tokenizer(path: Path | str) -> Tokenizer:
    """Read what `Tokenizer.save` wrote.

    Raises:
        UserError: when the file is missing, damaged or of another kind.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        if values["kind"] == ByteTokenizer.kind:
            return ByteTokenizer()
        if values["kind"] == BPETokenizer.kind:
            return BPETokenizer(json.dumps(values["tokenizer"]))
        if values["kind"] in ALPHABETS:
            from clearhead.data.letters import LetterTokenizer

            return LetterTokenizer(ALPHABETS[values["kind"]])
        if values["kind"] == "symbols":
            from clearhead.data.symbols import SymbolTokenizer

            return SymbolTokenizer(values["symbols"])
        if values["kind"] == "pretrained":
            from clearhead.data.pretrained_tokenizer import PretrainedTokenizer

            return PretrainedTokenizer(json.dumps(values["tokenizer"]), values["separator"])
    except FileNotFoundError as error:
        raise UserError(f"no tokenizer at {path}") from error
    except Exception as error:  # the library raises bare Exception for a state that it cannot read
        raise UserError(f"{path} is not a tokenizer of clearhead: {error}") from error
    raise UserError(
        f"{path} holds a tokenizer of kind {values['kind']!r}; known: bytes, bpe, pretrained, "
        f"{', '.join(ALPHABETS)}, symbols"
    )


def text_chunks(text: str) -> Iterator[str]:
    """Cut a long text before a line break that follows a non-space: no match of the word pattern spans it."""
    start = 0
    while len(text) - start > _CHUNK:
        end = text.find("\n", start + _CHUNK)
        while end > 0 and text[end - 1].isspace():
            end = text.find("\n", end + 1)
        if end < 0:
            break
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]
