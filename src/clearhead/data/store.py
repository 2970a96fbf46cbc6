"""Prepared text on disk: token files that are memory-mapped, appear whole or not at all, and are checked by
hash.

A folder holds `train.bin`, `val.bin`, `test.bin` (little-endian uint16, or uint32 for a large vocabulary),
`documents.json` (the index), `tokenizer.json` and `header.json` with the hash of each. The stream of a
split is

    SEP document SEP document ... SEP document SEP

so that a separator stands before every document and after the last one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.cache import file_sha256, json_sha256, new_folder, write_json
from clearhead.data.split import SPLITS, Split
from clearhead.data.tokenizer import Tokenizer, Tokens, load_tokenizer
from clearhead.errors import UserError

FORMAT = 1
HEADER, INDEX, TOKENIZER = "header.json", "documents.json", "tokenizer.json"


class Damaged(Exception):
    """A prepared folder that is not what was written; the message says which file."""


@dataclass(frozen=True)
class Document:
    """One document of a split.

    `tokens` is a read-only view of the memory-mapped file: the separator and then the text, [1 + n]. So the
    first token of the text has something to be predicted from: score `tokens[1:]`, which are exactly the
    `bytes` bytes of real text; the separator itself is never scored.
    """

    name: str
    tokens: npt.NDArray[Any]
    bytes: int
    """Bytes of the text, the denominator of bits per byte."""
    whole: bool
    """False when the text was cut (by position, or by `max_bytes`): its end is not the end of a document."""


@dataclass(frozen=True)
class EncodedDocument:
    """What `write_store` takes: a document's place and its tokens without a separator."""

    split: Split
    name: str
    tokens: Tokens
    bytes: int
    whole: bool


class Store:
    """An open prepared folder, verified. Use `open_store`."""

    def __init__(self, folder: Path, header: dict[str, Any], index: dict[str, list[list[Any]]]) -> None:
        self.folder = folder
        self.header = header
        self.tokenizer = load_tokenizer(folder / TOKENIZER)
        self._index = index
        self._streams = {split: np.memmap(folder / f"{split}.bin", dtype=header["dtype"], mode="r") for split in SPLITS}

    def stream(self, split: Split) -> npt.NDArray[Any]:
        """Return the packed tokens of a split, read-only."""
        return self._streams[split]

    def documents(self, split: Split) -> list[Document]:
        """Return the documents of a split in reading order."""
        stream = self._streams[split]
        return [
            Document(name, stream[start : start + 1 + count], size, whole)
            for name, start, count, size, whole in self._index[split]
        ]

    def cut_ends(self, split: Split) -> npt.NDArray[np.int64]:
        """Return the stream positions of separators that follow a cut text, sorted."""
        ends = [start + 1 + count for _, start, count, _, whole in self._index[split] if not whole]
        return np.asarray(ends, dtype=np.int64)


def write_store(
    folder: Path, tokenizer: Tokenizer, documents: Iterator[EncodedDocument], about: dict[str, Any]
) -> None:
    """Write a prepared folder, which appears when all of it is there; `about` goes into the header."""
    dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
    with new_folder(folder) as building:
        writers = {split: _Writer(building / f"{split}.bin", dtype, tokenizer.separator) for split in SPLITS}
        try:
            for document in documents:
                writers[document.split].add(document)
        finally:
            for writer in writers.values():
                writer.close()
        write_json(building / INDEX, {split: writers[split].index for split in SPLITS})
        tokenizer.save(building / TOKENIZER)
        files = {name: file_sha256(building / name) for name in (INDEX, TOKENIZER)}
        files |= {f"{split}.bin": writers[split].digest.hexdigest() for split in SPLITS}
        header = {
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size,
            "splits": {split: writers[split].counts() for split in SPLITS},
            **about,
        }
        seal(building, FORMAT, files, header)


def open_store(folder: Path) -> Store | None:
    """Open and verify a prepared folder; None when there is none.

    Raises:
        Damaged: a file is missing, cut short or changed.
    """
    if not folder.is_dir():
        return None
    with verified(folder, FORMAT) as header:
        return Store(folder, header, json.loads((folder / INDEX).read_text(encoding="utf-8")))


def seal(folder: Path, format_number: int, files: dict[str, str], header: dict[str, Any]) -> None:
    """Write the header of a prepared folder: what it says of itself, the hash of each file, and its own check."""
    whole = {
        "format": format_number,
        "files": files,
        **header,
        # What two runs must share to have seen the same data; free of paths and dates.
        "fingerprint": json_sha256({"format": format_number, "files": files}),
    }
    write_json(folder / HEADER, whole | {"check": json_sha256(whole)})


@contextmanager
def verified(folder: Path, format_number: int) -> Iterator[dict[str, Any]]:
    """Give the header of a folder that `seal` closed, to read the files by; `Damaged` when anything was changed.

    What fails inside the `with` block because a file is missing or unreadable is `Damaged` as well.
    """
    try:
        header = json.loads((folder / HEADER).read_text(encoding="utf-8"))
        check = header.pop("check")
        if check != json_sha256(header) or header["format"] != format_number:
            raise Damaged(f"{folder / HEADER} was changed")
        for name, digest in header["files"].items():
            if file_sha256(folder / name) != digest:
                raise Damaged(f"{folder / name} does not match its hash")
        yield header
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename} is missing") from error
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise Damaged(f"{folder / HEADER} cannot be read") from error


class _Writer:
    """Appends documents to one token file and keeps its index and hash."""

    def __init__(self, path: Path, dtype: str, separator: int) -> None:
        self.index: list[list[Any]] = []
        self.digest = hashlib.sha256()
        self._dtype = dtype
        self._stream = path.open("wb")
        self._separator = separator
        self._length = 0
        self._put(np.asarray([separator]))

    def _put(self, tokens: npt.NDArray[Any]) -> None:
        data = tokens.astype(self._dtype).tobytes()
        self.digest.update(data)
        self._stream.write(data)
        self._length += len(tokens)

    def add(self, document: EncodedDocument) -> None:
        start = self._length - 1  # of its separator, which is there already
        self.index.append([document.name, start, len(document.tokens), document.bytes, document.whole])
        self._put(document.tokens)
        self._put(np.asarray([self._separator]))

    def counts(self) -> dict[str, int]:
        return {
            "documents": len(self.index),
            "tokens": sum(row[2] for row in self.index),
            "bytes": sum(row[3] for row in self.index),
        }

    def close(self) -> None:
        self._stream.close()
