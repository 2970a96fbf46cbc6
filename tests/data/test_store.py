"""Damage: what is on disk is checked, rebuilt from the source, or refused when the source is gone."""

import os
import shutil
import time

import pytest

from clearhead.data import cache
from clearhead.data.config import DataConfig
from clearhead.data.text import prepare
from clearhead.errors import UserError


@pytest.fixture
def source(tmp_path, plays):
    return shutil.copytree(plays, tmp_path / "plays")


@pytest.fixture
def config(source):
    return DataConfig(source=str(source), context=64)


def prepared_folder(data_folder):
    (folder,) = [p for p in (data_folder / "prepared").iterdir() if p.name != "requests"]
    return folder


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit in the tokens": lambda folder: flip_a_bit(folder / "train.bin"),
    "tokens cut short": lambda folder: os.truncate(folder / "test.bin", 1000),
    "a missing file": lambda folder: (folder / "val.bin").unlink(),
    "a changed index": lambda folder: flip_a_bit(folder / "documents.json"),
    "a changed tokenizer": lambda folder: flip_a_bit(folder / "tokenizer.json"),
    "a changed header": lambda folder: flip_a_bit(folder / "header.json"),
    "half a header": lambda folder: os.truncate(folder / "header.json", 40),
    "an empty header": lambda folder: os.truncate(folder / "header.json", 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_noticed_and_mended_from_the_source(config, data_folder, damage):
    before = prepare(config).fingerprint
    DAMAGE[damage](prepared_folder(data_folder))
    lines = []
    assert prepare(config, progress=lines.append).fingerprint == before
    assert any("is prepared again" in line for line in lines)
    lines.clear()
    prepare(config, progress=lines.append)
    assert lines == []  # whole again


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_refused_when_the_source_is_gone(config, source, data_folder, damage):
    prepare(config)
    DAMAGE[damage](prepared_folder(data_folder))
    shutil.rmtree(source)
    with pytest.raises(UserError, match="cannot be prepared again: no such file or folder") as caught:
        prepare(config)
    assert "\n" not in str(caught.value)


def test_whole_text_outlives_its_source_and_says_so(config, source):
    before = prepare(config)
    shutil.rmtree(source)
    lines = []
    after = prepare(config, progress=lines.append)
    assert after.fingerprint == before.fingerprint
    assert "the source is not there" in lines[-1]
    assert "the source is not there" in after.summary["notes"][-1]


def test_a_source_that_never_was_prepared_is_refused(config, source):
    shutil.rmtree(source)
    with pytest.raises(UserError, match="no such file or folder"):
        prepare(config)


def test_a_failed_build_leaves_nothing(data_folder, source):
    (source / "zz.txt").write_bytes(b"good text then \xff")
    with pytest.raises(UserError, match="not UTF-8"):
        prepare(DataConfig(source=str(source)))
    assert not list((data_folder / "prepared").glob("*")) if (data_folder / "prepared").exists() else True


def test_leftovers_of_killed_processes_are_swept_after_a_day(tmp_path):
    old, young = tmp_path / ".tmp-old", tmp_path / ".tmp-young"
    old.mkdir()
    young.mkdir()
    os.utime(old, (time.time() - 2 * 86400,) * 2)
    with cache.new_folder(tmp_path / "final") as folder:
        (folder / "x").write_text("x")
    assert not old.exists()
    assert young.exists()
    assert (tmp_path / "final" / "x").read_text() == "x"


def test_the_first_of_two_builders_wins(tmp_path):
    with cache.new_folder(tmp_path / "final") as late:
        (late / "x").write_text("late")
        with cache.new_folder(tmp_path / "final") as early:
            (early / "x").write_text("early")
    assert (tmp_path / "final" / "x").read_text() == "early"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith((".tmp", "final"))] == ["final"]


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch, config):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot write to the data folder .* set CLEARHEAD_DATA"):
        prepare(config)


def test_the_default_folder_is_the_platforms_cache(monkeypatch):
    monkeypatch.delenv("CLEARHEAD_DATA")
    assert cache.cache_folder().name == "clearhead"
