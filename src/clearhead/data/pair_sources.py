"""From the name of a source to its sentence pairs: catalogue sets, and the user's own file.

A .tsv file holds a pair a line: source, tab, target, and, where there is one, another tab and the name of the document
that the pair is from. A .jsonl file holds objects with the keys "source" and "target", and perhaps "document". Either
may be .gz. Pairs of one document stay together when they are split.
"""

from __future__ import annotations

import html
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from clearhead.data.cache import Progress, file_sha256, json_sha256
from clearhead.data.catalogue import CATALOGUE, LanguagePair, find_pair, pair_names
from clearhead.data.fetch import debian_folders, fetch_entry, how_to_get
from clearhead.data.sources import checked, open_data, unreadable
from clearhead.errors import UserError, nearest

ENDINGS = (".tsv", ".jsonl", ".tsv.gz", ".jsonl.gz")


@dataclass(frozen=True)
class RawPair:
    """A text and its translation, white space at the ends cut off."""

    document: str
    """The book or page that it is from; "" = known to be from none."""
    source: str
    target: str


@dataclass(frozen=True)
class PairSource:
    """A readable source of pairs, and what to say about it in a report."""

    label: str
    licence: str
    files: tuple[Path, ...]
    read: Callable[[], Iterator[RawPair]]

    def digest(self) -> str:
        """Return one hash over the bytes of all files, in their order."""
        return json_sha256([file_sha256(path) for path in self.files])


def resolve_pairs(source: str, progress: Progress | None = None) -> PairSource:
    """Find a source of pairs by name (`verses-en-de`) or path; a set that pip can bring is fetched when it is absent.

    Raises `UserError`, in one line, for an unknown name, a missing file, an ending that is not read.
    """
    pair = find_pair(source)
    if pair is not None:
        return _help(pair) if pair.entry.kind == "debian" else _verses(pair, progress)
    if source in CATALOGUE:
        held = CATALOGUE[source]
        if held.languages:
            example = f"{source}-{held.languages[0]}-{held.languages[1]}"
            raise UserError(f"{source} holds {', '.join(held.languages)}; name two of them, such as {example}")
        raise UserError(
            f"{source} is running text, not sentence pairs; translation reads {', '.join(pair_names())}, or your own "
            f"file ({', '.join(ENDINGS)})"
        )
    path = Path(source).expanduser()
    if path.is_file():
        name = path.name.lower()
        if not name.endswith(ENDINGS):
            raise UserError(f"{path}: not a kind of file that holds pairs; known: {', '.join(ENDINGS)}")
        lines = _tsv if ".tsv" in name[-7:] else _json_lines
        return PairSource(path.name, "the user's own", (path,), lambda: lines(path))
    if path.exists():
        raise UserError(f"{path} is not a file; translation reads one file of pairs ({', '.join(ENDINGS)})")
    if "/" in source or "\\" in source or source.lower().endswith(ENDINGS):
        raise UserError(f"no such file: {source}")
    raise UserError(
        f"no set of pairs and no file is called {source!r}{nearest(source, pair_names())}; sets: "
        f"{', '.join(pair_names())} (either direction); or give the path of a file ({', '.join(ENDINGS)})"
    )


# ---- the Bible: one file a language, a line a verse ----


def _verses(pair: LanguagePair, progress: Progress | None) -> PairSource:
    folder = fetch_entry(pair.entry, progress)
    files = tuple(folder / f"{language}.tsv" for language in (pair.source, pair.target))

    def read() -> Iterator[RawPair]:
        first, second = (dict(_fields(path, 2)) for path in files)
        for place, text in first.items():
            if place in second:
                yield RawPair(place.split(".")[0], text, second[place])

    label = f"{pair.entry.name} {pair.entry.package} {pair.entry.version}, {pair.source} to {pair.target}"
    return PairSource(label, pair.entry.licence, files, read)


def _fields(path: Path, count: int) -> Iterator[list[str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        yield line.split("\t", count - 1)


# ---- LibreOffice's help: a folder of pages a language, paragraphs with the same ids ----

_PARAGRAPH = re.compile(r'<(p|h[1-6])\s[^>]*?id="((?:par|hd)_id\d+)"[^>]*>(.*?)</\1>', re.DOTALL)
_BREAK, _TAG = re.compile(r"<br[^>]*>"), re.compile(r"<[^>]*>")


def _help(pair: LanguagePair) -> PairSource:
    folders = debian_folders(pair.entry, (pair.source, pair.target))
    if folders is None:
        raise how_to_get(pair.entry)
    first, second = folders
    ours = sorted(path.relative_to(first) for path in first.rglob("*.html"))
    pages = [page for page in ours if (second / page).is_file()]

    def read() -> Iterator[RawPair]:
        for page in pages:
            here, there = _paragraphs(first / page), _paragraphs(second / page)
            for place, text in here.items():
                if place in there:
                    yield RawPair(page.as_posix(), text, there[place])

    label = f"{pair.entry.name}, {pair.source} to {pair.target}"
    files = tuple(folder / page for page in pages for folder in folders)
    return PairSource(label, pair.entry.licence, files, read)


def _paragraphs(page: Path) -> dict[tuple[str, int], str]:
    """Text by paragraph id and the how-manieth of that id (a page may embed a paragraph twice)."""
    found: dict[tuple[str, int], str] = {}
    for match in _PARAGRAPH.finditer(page.read_text(encoding="utf-8")):
        text = " ".join(html.unescape(_TAG.sub("", _BREAK.sub(" ", match[3]))).split())
        times = 0
        while (match[2], times) in found:
            times += 1
        found[match[2], times] = text
    return found


# ---- the user's own file ----


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (where, line) for every line that is not blank."""
    try:
        with open_data(path) as stream:
            for number, line in enumerate(stream, 1):
                where = f"{path}, line {number}"
                text = checked(line, where).decode().strip("\r\n")
                if text.strip():
                    yield where, text
    except (OSError, EOFError, zlib.error) as error:
        raise unreadable(path, error) from error


def _tsv(path: Path) -> Iterator[RawPair]:
    for where, line in _lines(path):
        fields = line.split("\t")
        if len(fields) not in (2, 3):
            raise UserError(
                f"{where}: expected source, tab, target (and perhaps a document), got {len(fields)} field(s)"
            )
        yield RawPair(fields[2].strip() if len(fields) == 3 else "", fields[0].strip(), fields[1].strip())


def _json_lines(path: Path) -> Iterator[RawPair]:
    for where, line in _lines(path):
        try:
            value = json.loads(line)
        except ValueError as error:
            raise UserError(f"{where}: not a JSON object ({error})") from error
        if not isinstance(value, dict):
            raise UserError(f'{where}: expected an object with "source" and "target", got {type(value).__name__}')
        for key in ("source", "target"):
            if not isinstance(value.get(key), str):
                keys = ", ".join(map(repr, list(value)[:8])) or "none"
                raise UserError(f'{where}: the key "{key}" is missing or holds no text; keys: {keys}')
        yield RawPair(str(value.get("document", "")), value["source"].strip(), value["target"].strip())
