"""Archive members to text files: what `fetch` keeps of a package. No code of the package runs."""

from __future__ import annotations

import re
import shutil
import sqlite3
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import IO

from clearhead.data.catalogue import Entry
from clearhead.errors import UserError

TextFile = tuple[str, bytes]
"""A plain file name (no folder) and its bytes."""


def text_files(entry: Entry, archive: Path) -> Iterator[TextFile]:
    """Yield the text files of `archive` that `entry` asks for, sorted by name.

    Only regular members are read; a member's folder is dropped, so that no member can be written elsewhere.

    Raises:
        UserError: when the archive holds nothing that the entry names.
    """
    with _members(archive) as (names, open_member):
        wanted = sorted(name for name in names if _matches(name, entry))
        if not wanted:
            raise UserError(f"{entry.archive} holds no file that {entry.name!r} names; the catalogue is wrong")
        if entry.convert in ("bible", "verses"):
            yield from (_bible if entry.convert == "bible" else _verses)(open_member(wanted[0]))
            return
        for name in wanted:
            with open_member(name) as stream:
                data = stream.read()
            plain = PurePosixPath(name).name
            yield (plain, data) if entry.convert == "copy" else (plain, _without_tags(data))


def _matches(name: str, entry: Entry) -> bool:
    return any(fnmatchcase(name, p) for p in entry.take) and not any(fnmatchcase(name, p) for p in entry.leave)


@contextmanager
def _members(archive: Path) -> Iterator[tuple[list[str], Callable[[str], IO[bytes]]]]:
    """Open a zip or tar archive: the names of its regular files, and a function that opens one."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            yield [info.filename for info in packed.infolist() if not info.is_dir()], packed.open
        return
    with tarfile.open(archive) as tape:
        files = {member.name: member for member in tape.getmembers() if member.isfile()}

        def open_member(name: str) -> IO[bytes]:
            stream = tape.extractfile(files[name])
            assert stream is not None  # regular files always have one
            return stream

        yield list(files), open_member


_TAGGED = re.compile(rb"(\S+)/[^\s/]+")


def _without_tags(data: bytes) -> bytes:
    """Turn the Brown corpus's `The/at Fulton/np-tl` lines into words with spaces between."""
    lines = (line.strip() for line in data.splitlines())
    return b"\n".join(_TAGGED.sub(rb"\1", line) for line in lines if line) + b"\n"


_KING_JAMES = "k"
_VERSES = "select cNumber, vText from bible where bbName = ? and bNumber = ? order by cNumber, vNumber"
_BOOKS = "select bNumber, bName from bibleRef where bbName = ? order by bNumber"


# The one translation that stands for each language; the database has modern ones too, whose rights are unclear.
_TRANSLATIONS = {"en": "4", "de": "e", "fr": "l", "es": "v", "it": "d", "ru": "r", "ar": "y"}
_ALL_VERSES = "select bNumber, cNumber, vNumber, vText from bible where bbName = ? order by bNumber, cNumber, vNumber"


def _bible(stream: IO[bytes]) -> Iterator[TextFile]:
    """Read the King James Version out of the SQLite file: a file a book, a line a verse, chapters apart."""
    with _database(stream) as database:
        for number, book in database.execute(_BOOKS, (_KING_JAMES,)).fetchall():
            chapters: dict[int, list[str]] = {}
            for chapter, verse in database.execute(_VERSES, (_KING_JAMES, number)):
                chapters.setdefault(chapter, []).append(verse.strip())
            text = "\n\n".join("\n".join(lines) for lines in chapters.values()) + "\n"
            yield f"{number:02d}_{book.lower().replace(' ', '_')}.txt", text.encode()


def _verses(stream: IO[bytes]) -> Iterator[TextFile]:
    """Read one translation a language: a file a language, a line a verse, `book.chapter.verse <tab> text`."""
    with _database(stream) as database:
        for language, translation in sorted(_TRANSLATIONS.items()):
            rows = database.execute(_ALL_VERSES, (translation,))
            lines = (f"{book}.{chapter}.{verse}\t{' '.join(text.split())}\n" for book, chapter, verse, text in rows)
            yield f"{language}.tsv", "".join(lines).encode()


@contextmanager
def _database(stream: IO[bytes]) -> Iterator[sqlite3.Connection]:
    """The SQLite file of the stream, copied to where SQLite can read it."""
    with tempfile.TemporaryDirectory(prefix="clearhead-") as scratch:
        copy = Path(scratch) / "bible.db"
        with copy.open("wb") as target:
            shutil.copyfileobj(stream, target)
        with closing(sqlite3.connect(f"{copy.as_uri()}?mode=ro", uri=True)) as database:
            yield database
