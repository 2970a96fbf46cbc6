"""Sequence files: FASTA (NCBI's format) and the flat files of EMBL and SwissProt; every record is a document.

Letters are made upper case; of the rest of a record its name alone is kept. DNA files (.fna, .ffn, EMBL) also get
U -> T, and each letter that stands for several bases (R, Y, S, W, K, M, B, D, H, V) becomes N. Proteins keep their
letters; a `*` at the end (a stop) goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from clearhead.errors import UserError

Record = tuple[str, bytes]
"""A record's name and its letters."""

_UPPER = bytes(range(65, 91))
_DNA = bytes.maketrans(b"URYSWKMBDHV", b"TNNNNNNNNNN")
_BASES = b"ACGTN"


def _letters(raw: bytes, where: str, *, dna: bool) -> bytes:
    """Upper-case letters of a record without white space."""
    letters = b"".join(raw.split()).upper().removesuffix(b"*")
    letters = letters.translate(_DNA) if dna else letters
    strange = letters.translate(None, _BASES if dna else _UPPER)
    if strange:
        hint = "; an alignment must lose its gaps first" if strange[:1] in b"-." else ""
        raise UserError(
            f"{where}: expected {'bases' if dna else 'letters'}, got {strange[:1].decode('latin-1')!r}{hint}"
        )
    return letters


def read_fasta(data: bytes, where: str, *, dna: bool) -> Iterator[Record]:
    """Yield the records of a FASTA text: `>name what it is`, then letters on any number of lines.

    Raises `UserError` for text before the first name, and for anything that is no letter.
    """
    head, *records = (b"\n" + data.replace(b"\r\n", b"\n")).split(b"\n>")
    if head.strip():
        raise UserError(f"{where}: not FASTA, the first line does not begin with '>'")
    for number, record in enumerate(records, 1):
        title, _, lines = record.partition(b"\n")
        name = (title.split() or [b""])[0].decode(errors="replace") or f"record {number}"
        yield name, _letters(lines, f"{where}, {name}", dna=dna)


def read_flat(data: bytes, where: str, *, dna: bool) -> Iterator[Record]:
    """Yield the records of an EMBL or SwissProt flat file: `ID   name`, ... `SQ`, letters in blocks, `//`.

    Raises `UserError` when a record has no ID or no end, or a sequence line holds something strange.
    """
    name, inside = "", False
    lines: list[bytes] = []
    for line in data.splitlines():
        if line.startswith(b"ID "):
            name = line[2:].split()[0].decode(errors="replace").rstrip(";")
        elif line.startswith(b"SQ "):
            if not name:
                raise UserError(f"{where}: not a flat file of EMBL or SwissProt, a sequence comes before its ID")
            inside = True
        elif line.startswith(b"//"):
            if inside:
                yield name, _letters(b"".join(lines), f"{where}, {name}", dna=dna)
            name, lines, inside = "", [], False
        elif inside:
            lines.append(line.translate(None, b"0123456789"))  # EMBL numbers its lines
    if inside:
        raise UserError(f"{where}, {name}: the file ends within the sequence; it was cut off")


READERS: dict[str, Callable[[bytes, str], Iterator[Record]]] = {
    "fasta": lambda data, where: read_fasta(data, where, dna=False),
    "fasta-dna": lambda data, where: read_fasta(data, where, dna=True),
    "flat": lambda data, where: read_flat(data, where, dna=False),
    "flat-dna": lambda data, where: read_flat(data, where, dna=True),
}
BY_ENDING = {".fna": "fasta-dna", ".ffn": "fasta-dna", ".fa": "fasta", ".fasta": "fasta", ".faa": "fasta"}
"""Format of a user's file by its ending, with .gz or without."""


def reverse_complement(letters: bytes) -> bytes:
    """The other strand, read in its own direction."""
    return letters[::-1].translate(bytes.maketrans(b"ACGT", b"TGCA"))


def shared_share(held_out: bytes, training: bytes, word: int = 32) -> tuple[float, float]:
    """Share of the words of `word` bases of `held_out` that `training` has too: on the same strand, and on either.

    A genome repeats itself, and a gene may lie on one strand here and on the other there, so stretches that share no
    position may still share text. Words with an N count for nothing. `word` is at most 32: a word is one 64-bit number.
    """
    if not 1 <= word <= 32:
        raise ValueError(f"word: expected 1 to 32 bases, got {word}")
    asked = _words(held_out, word)
    if not asked.size:
        raise ValueError(f"held_out: expected at least one word of {word} bases A C G T")
    same = _found(asked, _words(training, word))
    either = same | _found(asked, _words(reverse_complement(training), word))
    return float(same.mean()), float(either.mean())


def _found(asked: npt.NDArray[np.uint64], words: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Which of the words asked for are among `words`."""
    if not words.size:
        return np.zeros(asked.shape, dtype=np.bool_)
    words = np.sort(words)
    return words[np.searchsorted(words, asked).clip(max=words.size - 1)] == asked


def _words(letters: bytes, word: int) -> npt.NDArray[np.uint64]:
    code = np.full(256, 4, dtype=np.uint64)
    code[np.frombuffer(b"ACGT", dtype=np.uint8)] = np.arange(4, dtype=np.uint64)
    codes = code[np.frombuffer(letters, dtype=np.uint8)]
    count = max(len(codes) - word + 1, 0)
    value, good = np.zeros(count, dtype=np.uint64), np.ones(count, dtype=np.bool_)
    for place in range(word):
        part = codes[place : place + count]
        value = value * np.uint64(4) + (part & np.uint64(3))
        good &= part < 4
    return value[good]
