"""Read the binary file of a CTranslate2 model: named arrays and aliases.

Layout (little endian), as written by CTranslate2 since version 4 of the format:

    u32 format version, string specification, u32 its revision,
    u32 count, and for each array: string name, u8 rank, u32 x rank shape, u8 type, u32 bytes, the values,
    u32 count, and for each alias: string name, string the array that it stands for

A string is a u16 length, the bytes, and a closing zero that the length counts. The reader trusts no length: what
does not fit in the file, a size that the shape contradicts, or bytes after the end raise.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clearhead.errors import UserError

FORMATS = range(4, 7)
_TYPES = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}


@dataclass(frozen=True)
class CTranslate2File:
    """What a file holds."""

    specification: str
    revision: int
    arrays: dict[str, np.ndarray]
    """Name -> array; a scalar has shape ()."""
    aliases: dict[str, str]
    """Name -> name of the array that it stands for."""


def read_ctranslate2(path: Path) -> CTranslate2File:
    """Return the arrays of a CTranslate2 `model.bin`, copied out of it.

    Raises:
        UserError: for a file of another kind or version, a truncated one, a type that is not known (bf16 among them).
    """
    cursor = _Cursor(path)
    form = cursor.number("I")
    if form not in FORMATS:
        known = f"{FORMATS[0]} to {FORMATS[-1]}"
        raise UserError(f"{path} is no CTranslate2 model of format {known}: it begins with {form}")
    specification, revision = cursor.string(), cursor.number("I")
    arrays: dict[str, np.ndarray] = {}
    for _ in range(cursor.number("I")):
        name = cursor.string()
        shape = tuple(cursor.number("I") for _ in range(cursor.number("B")))
        kind, size = cursor.number("B"), cursor.number("I")
        if kind not in _TYPES:
            raise UserError(f"{path}: {name} has values of type {kind}; known: {', '.join(map(str, _TYPES))}")
        dtype = np.dtype(_TYPES[kind]).newbyteorder("<")
        if math.prod(shape) * dtype.itemsize != size:
            raise UserError(f"{path}: {name} has shape {shape} and {size} bytes, which do not fit together")
        arrays[name] = np.frombuffer(cursor.take(size), dtype).reshape(shape).astype(_TYPES[kind])
    aliases = {cursor.string(): cursor.string() for _ in range(cursor.number("I"))}
    if not cursor.at_end:
        raise UserError(f"{path} goes on after its last alias; it is not the format that is known here")
    lost = [f"{name} -> {target}" for name, target in aliases.items() if target not in arrays]
    if lost:
        raise UserError(f"{path}: aliases of arrays that are not there: {', '.join(lost)}")
    return CTranslate2File(specification, revision, arrays, aliases)


class _Cursor:
    """A place in the file's bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = memoryview(path.read_bytes())
        self._at = 0

    @property
    def at_end(self) -> bool:
        return self._at == len(self._bytes)

    def take(self, count: int) -> memoryview:
        if self._at + count > len(self._bytes):
            raise UserError(f"{self._path} is cut short: it ends at byte {len(self._bytes):,}, amid a value")
        self._at += count
        return self._bytes[self._at - count : self._at]

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0])

    def string(self) -> str:
        return bytes(self.take(self.number("H"))).rstrip(b"\0").decode("utf-8", errors="replace")
