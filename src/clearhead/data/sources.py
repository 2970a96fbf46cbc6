"""From the name of a source to its documents: catalogue sets, the user's files and folders."""

from __future__ import annotations

import gzip
import hashlib
import importlib.metadata
import json
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from clearhead.data.cache import Progress, file_sha256, json_sha256
from clearhead.data.catalogue import CATALOGUE, Entry, find_pair
from clearhead.data.config import SYNTHETIC
from clearhead.data.fetch import debian_files, fetch_entry
from clearhead.data.sequences import BY_ENDING, READERS
from clearhead.errors import UserError, nearest

_PLAIN = (".txt", ".jsonl", *BY_ENDING)
ENDINGS = (*_PLAIN, *(f"{ending}.gz" for ending in _PLAIN))
"""What is read of a user's folder; matching is by lower-case ending."""

# Folders of the standard library that hold tests, other packages or byte code.
_NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class RawDocument:
    """One document as it stands in its source: UTF-8, checked, without a byte-order mark."""

    name: str
    data: bytes

    def content_key(self) -> bytes:
        """Return a digest that is equal for texts that differ only in line endings or outer white space."""
        return hashlib.sha256(self.data.replace(b"\r\n", b"\n").strip()).digest()


@dataclass(frozen=True)
class SourceFile:
    """A file of a source; `name` is what its document is called (a .jsonl holds many: `name:line`)."""

    name: str
    path: Path
    format: str = ""
    """A sequence format of `data/sequences.py`; empty = by the file's ending."""
    leave: tuple[str, ...] = ()
    """Of a sequence file: names of records that are left out."""

    def reader(self) -> str:
        """The sequence format of the file, or "" for text."""
        return self.format or BY_ENDING.get(_ending(self.path).removesuffix(".gz"), "")


@dataclass(frozen=True)
class Source:
    """A readable source: its files in reading order, and what to say about it in a report."""

    label: str
    """A name without a folder, fit for a report that others read."""
    licence: str
    files: tuple[SourceFile, ...]

    def digest(self) -> str:
        """Return one hash over the names and bytes of all files."""
        return json_sha256([[file.name, file_sha256(file.path), *file.leave] for file in self.files])

    def documents(self) -> Iterator[RawDocument]:
        """Yield every document in a fixed order, empty ones included.

        Raises:
            UserError: one line that names the file (and line) when something cannot be read as text.
        """
        for file in self.files:
            if file.reader():
                for name, letters in READERS[file.reader()](_read(file.path), str(file.path)):
                    if name not in file.leave:
                        yield RawDocument(name, letters)
            elif _ending(file.path) in (".jsonl", ".jsonl.gz"):
                yield from _json_lines(file)
            else:
                yield RawDocument(file.name, checked(_read(file.path), str(file.path)))


def resolve(source: str, progress: Progress | None = None) -> Source:
    """Find a source by name or path; a catalogue set that pip can bring is fetched when it is absent.

    A catalogue name wins over a file of the same name (write `./name` for the file).

    Raises:
        UserError: unknown name, missing path, a folder without text, an ending that is not read.
    """
    if find_pair(source) is not None or (source in CATALOGUE and CATALOGUE[source].languages):
        raise UserError(f"{source} is a set of sentence pairs, not running text; it is for: --task translation")
    if source.startswith(SYNTHETIC):
        raise UserError(f"{source} is a generated task and has no text; it is for train, evaluate, compare and inspect")
    if source in CATALOGUE:
        return _from_catalogue(CATALOGUE[source], progress)
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if path.is_file():
        if not _ending(path):
            raise UserError(f"{path}: not a kind of file that is read; known: {', '.join(ENDINGS)}")
        return Source(path.name, "the user's own", (SourceFile(_stem(path.name), path),))
    if path.exists():
        raise UserError(f"{path} is neither a file nor a folder")
    if "/" in source or "\\" in source or "." in source:
        raise UserError(f"no such file or folder: {source}")
    raise UserError(
        f"no data set and no file is called {source!r}{nearest(source, CATALOGUE)}; "
        f"data sets: {', '.join(CATALOGUE)}; or give the path of a file ({', '.join(ENDINGS)}) or a folder"
    )


def _from_catalogue(entry: Entry, progress: Progress | None) -> Source:
    folder = fetch_entry(entry, progress)
    label = f"{entry.name} {entry.version}".strip()
    if entry.kind == "builtin":
        files = _library_files(folder)
        label = f"{entry.name} of {_version_here(entry)}"
    elif entry.kind == "debian":
        label = entry.name  # whatever version the system has
        files = [(_inside(path, folder), path) for path in debian_files(entry, folder)]
    else:
        files = [(path.name, path) for path in sorted(folder.iterdir()) if path.name != "manifest.json"]
    return Source(
        label,
        entry.licence,
        tuple(
            SourceFile(
                name.removesuffix(".gz").removesuffix(entry.suffix),
                path,
                entry.format,
                entry.leave * bool(entry.format),
            )
            for name, path in files
        ),
    )


def _version_here(entry: Entry) -> str:
    if entry.package:
        return f"{entry.package} {importlib.metadata.version(entry.package)}"
    return f"Python {sysconfig.get_python_version()}"


def _library_files(stdlib: Path) -> list[tuple[str, Path]]:
    paths = (path for path in stdlib.rglob("*.py") if path.is_file())
    kept = [path for path in paths if not _NOT_LIBRARY.intersection(path.relative_to(stdlib).parts)]
    return [(path.relative_to(stdlib).as_posix(), path) for path in sorted(kept)]


def _inside(path: Path, root: Path) -> str:
    """Name a Debian file by its place below the package's documentation folder."""
    return "/".join(path.relative_to(root).parts[5:])


def _from_folder(folder: Path) -> Source:
    paths = (path for path in folder.rglob("*") if path.is_file() and _ending(path))
    visible = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    if not visible:
        raise UserError(f"{folder} holds no text that is read ({', '.join(ENDINGS)}, hidden files aside)")
    names = [(path.relative_to(folder).as_posix(), path) for path in visible]
    return Source(folder.absolute().name, "the user's own", tuple(SourceFile(_stem(n), p) for n, p in sorted(names)))


def _ending(path: Path) -> str:
    """Return the ending that decides how a file is read, or "" when it is none of ours."""
    name = path.name.lower()
    return next((e for e in sorted(ENDINGS, key=len, reverse=True) if name.endswith(e)), "")


def _stem(name: str) -> str:
    ending = _ending(Path(name))
    return name[: len(name) - len(ending)] if ending.startswith(".txt") else name


def open_data(path: Path) -> IO[bytes]:
    """Open a file, unpacking a .gz."""
    if path.name.lower().endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    return path.open("rb")


def _read(path: Path) -> bytes:
    try:
        with open_data(path) as stream:
            return stream.read()
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that could not be read, in one line."""
    if isinstance(error, EOFError):
        return UserError(f"{path}: the gzip file ends too early; it was cut off, fetch it again")
    if isinstance(error, (gzip.BadGzipFile, zlib.error)):
        return UserError(f"{path}: not a valid gzip file ({error})")
    return UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})")


def checked(data: bytes, where: str) -> bytes:
    """Drop a byte-order mark and make sure that the rest is UTF-8."""
    data = data.removeprefix(_BOM)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: byte {error.start} (0x{data[error.start]:02x}) is not UTF-8; convert the file, "
            "for example with: iconv -f latin1 -t utf-8"
        ) from error
    return data


def _json_lines(file: SourceFile) -> Iterator[RawDocument]:
    try:
        with open_data(file.path) as stream:
            for number, line in enumerate(stream, 1):
                where = f"{file.path}, line {number}"
                line = checked(line, where)
                if line.strip():
                    yield RawDocument(f"{file.name}:{number}", _text_of(line, where))
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(file.path, error) from error


def _text_of(line: bytes, where: str) -> bytes:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not a JSON object ({error})") from error
    if not isinstance(value, dict):
        raise UserError(f'{where}: expected an object with the key "text", got {type(value).__name__}')
    if "text" not in value:
        keys = ", ".join(map(repr, list(value)[:8])) or "none"
        raise UserError(f'{where}: the key "text" is missing{nearest("text", map(str, value))}; keys: {keys}')
    if not isinstance(value["text"], str):
        raise UserError(f'{where}: "text" must be a string, got {type(value["text"]).__name__}')
    try:
        return value["text"].encode()
    except UnicodeEncodeError as error:
        raise UserError(f'{where}: "text" holds half of a surrogate pair, which is no character') from error
