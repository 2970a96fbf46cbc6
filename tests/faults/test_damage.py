"""Bytes that flipped, files that are half there or gone: noticed before they are believed, mended where it can be."""

from __future__ import annotations

import os
import shutil
import signal
import warnings
from pathlib import Path

import pytest

from clearhead.data.config import DataConfig
from clearhead.data.text import prepare
from clearhead.errors import UserError
from clearhead.train import checkpoint as store
from tests.faults import commands
from tests.faults.child import Child, forked, on_file_events
from tests.faults.kills import differences
from tests.faults.test_disk import one_line, said, within
from tests.faults.told import fault


def harm(path: Path, how: str) -> None:
    good = path.read_bytes()
    middle = len(good) // 2
    path.write_bytes(good[:middle] if how == "cut" else good[:middle] + bytes([good[middle] ^ 16]) + good[middle + 1 :])


@pytest.fixture
def stopped(text, data, tmp_path) -> Path:
    """A run with two whole checkpoints, killed."""
    run = tmp_path / "run"

    def dying() -> int:
        def see(event: str, path: str) -> None:
            if event == "os.rename" and path.endswith(".step-00000006.part"):
                os.kill(os.getpid(), signal.SIGKILL)

        on_file_events(run, see)
        return commands.train(text, run, data)()

    assert forked(dying).code == -signal.SIGKILL
    assert len(store.checkpoints(run)) == 2
    return run


@fault("{case} in the newest checkpoint", "a warning names it; goes on from the one before, bit-equal at the end")
@pytest.mark.parametrize("how", ["a byte flipped", "cut in half"])
def test_damaged_checkpoint(stopped, text, data, whole, how):
    harm(store.checkpoints(stopped)[0] / store.MODEL, how.split()[0])
    ended = forked(commands.train(text, stopped, data))
    assert ended.code == 0, ended.err
    assert "step-00000004 is damaged" in ended.err
    assert not differences(commands.trained(stopped), whole)


@fault("no checkpoint is whole", "one line, exit code 2, which says what to remove; nothing is touched")
def test_every_checkpoint_damaged(stopped, text, data):
    for folder in store.checkpoints(stopped):
        harm(folder / store.OPTIMIZER, "cut")
    before = commands.prepared(stopped)
    ended = forked(commands.train(text, stopped, data))
    assert ended.code == 2, ended.err
    one_line(ended.err, "no checkpoint can be read .* to train again from the start")
    assert {k: v for k, v in commands.prepared(stopped).items() if k != ".lock"} == {
        k: v for k, v in before.items() if k != ".lock"
    }


@fault("{case}", "prepared again from the text, which one line says; tokens and fingerprint are the same")
@pytest.mark.parametrize("what", ["a byte flipped in prepared tokens", "a token file cut in half", "its index flipped"])
def test_damaged_tokens(text, tmp_path, monkeypatch, what):
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path))
    config = DataConfig(source=str(text), context=32, val_fraction=0.2, test_fraction=0.2)
    good = prepare(config)
    tokens = good.stream("train").tolist()
    harm(
        next(tmp_path.glob("prepared/*/documents.json" if "index" in what else "prepared/*/train.bin")),
        "cut" if "half" in what else "flip",
    )
    lines: list[str] = []
    again = prepare(config, progress=lines.append)
    assert any("prepared again" in line for line in lines), lines
    assert again.fingerprint == good.fingerprint
    assert again.stream("train").tolist() == tokens


@fault("{case} of a fetched set", "never taken out of: one line, exit code 2, which says to delete it")
@pytest.mark.parametrize("how", ["a byte flipped in the archive", "a half archive"])
def test_damaged_archive(stage, tmp_path, how):
    def action() -> None:
        (tmp_path / "npm").mkdir()
        shutil.copy(stage.archive, tmp_path / "npm")
        harm(tmp_path / "npm" / stage.archive.name, "cut" if "half" in how else "flip")
        code, error = said(commands.data(stage.archive, tmp_path))
        assert code == 2, error
        one_line(error, "is not the pinned file: SHA-256 .* delete it")
        assert not (tmp_path / "sets").exists() or not list((tmp_path / "sets").iterdir())
        (tmp_path / "npm" / stage.archive.name).unlink()
        assert said(commands.data(stage.archive, tmp_path))[0] == 0

    within(action)


@fault("a byte flipped in a fetched text", "not used: one line says so and the set is fetched again from its archive")
def test_damaged_set(stage, tmp_path):
    def action() -> None:
        assert said(commands.data(stage.archive, tmp_path))[0] == 0
        wanted = commands.prepared(tmp_path)
        harm(next((tmp_path / "sets").glob("*/text1.txt")), "flip")
        code, error = said(commands.data(stage.archive, tmp_path))
        assert code == 0, error
        assert "is damaged and is fetched again" in error
        assert commands.prepared(tmp_path) == wanted

    within(action)


@fault("the text disappears while a run is stopped", "the tokens prepared before are used, which one line says")
def test_text_that_is_gone(text, tmp_path, whole):
    own, place, run = tmp_path / "text", tmp_path / "data", tmp_path / "run"
    shutil.copytree(text, own)

    def dying() -> int:
        def see(event: str, path: str) -> None:
            if event == "os.rename" and path.endswith(".step-00000004.part"):
                os.kill(os.getpid(), signal.SIGKILL)

        on_file_events(run, see)
        return commands.train(own, run, place)()

    assert forked(dying).code == -signal.SIGKILL
    shutil.rmtree(own)
    ended = forked(commands.train(own, run, place))
    assert ended.code == 0, ended.err
    assert "the source is not there" in ended.err
    assert not differences(commands.trained(run)["history"], whole["history"])


@fault("the prepared tokens disappear under a run", "the run has them open and ends bit-equal; prepared anew next time")
def test_tokens_that_disappear(text, tmp_path, whole):
    place, run = tmp_path / "data", tmp_path / "run"

    def robbed() -> int:
        def see(event: str, path: str) -> None:
            if event == "os.rename" and path.endswith(".step-00000002.part"):
                shutil.rmtree(place / "prepared")

        on_file_events(run, see)
        return commands.train(text, run, place)()

    ended = forked(robbed)
    assert ended.code == 0, ended.err
    assert not (place / "prepared").exists()
    assert not differences(commands.trained(run), whole)


@fault(
    "the prepared tokens are cut short under a run", "the system ends the run; the same command prepares and goes on"
)
def test_tokens_that_are_cut(text, tmp_path, whole):
    place, run = tmp_path / "data", tmp_path / "run"

    def robbed() -> int:
        def see(event: str, path: str) -> None:
            if event == "os.rename" and path.endswith(".step-00000002.part"):
                os.truncate(next(place.glob("prepared/*/train.bin")), 0)

        on_file_events(run, see)
        return commands.train(text, run, place)()

    ended = forked(robbed)
    assert ended.code == -signal.SIGBUS, ended
    ended = forked(commands.train(text, run, place))
    assert ended.code == 0, ended.err
    assert not differences(commands.trained(run), whole)


@fault("{case} of a comparison is damaged", "the file is made again; results as before")
@pytest.mark.full
@pytest.mark.parametrize("name", ["probe.json", "resolved.json", "runs/laser/seed1/result.json", "results.json"])
def test_damaged_file_of_a_comparison(stage, tmp_path, name):
    wanted = stage.untouched("compare")[0]
    folder = tmp_path / "c"
    shutil.copytree(stage.place / "untouched-compare", folder)
    harm(folder / name, "cut")
    ended = forked(stage.command("compare", folder))
    assert ended.code == 0, ended.err
    assert not differences(commands.compared(folder), wanted)


@fault("a run's folder is removed under it", "one line, exit code 2")
def test_a_run_folder_that_disappears(text, data, tmp_path):
    run = tmp_path / "run"

    def robbed() -> int:
        def see(event: str, path: str) -> None:
            if event == "os.mkdir" and path.endswith(".step-00000004.part"):
                shutil.rmtree(run)
                Path(run).write_text("another thing")  # so that no folder can be made there again

        on_file_events(run, see)
        return commands.train(text, run, data)()

    ended = forked(robbed)
    assert ended.code == 2, ended
    one_line(ended.err, "cannot be written")


def test_a_folder_that_is_held_is_not_swept_away(tmp_path):
    """However old the clock says it is: another process may be filling it."""
    from clearhead.data.cache import new_folder

    ready, go = os.pipe()

    def building() -> int:
        with new_folder(tmp_path / "one") as folder:
            os.utime(folder, (0, 0))
            os.write(go, b"x")
            signal.sigtimedwait([signal.SIGUSR1], 20)
            (folder / "file").write_text("whole")
        return 0

    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    child = Child(building)
    os.read(ready, 1)
    (tmp_path / ".tmp-left").mkdir()
    os.utime(tmp_path / ".tmp-left", (0, 0))
    with new_folder(tmp_path / "two"):
        pass
    os.kill(child.pid, signal.SIGUSR1)
    ended = child.wait()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])
    assert ended.code == 0, ended.err
    assert (tmp_path / "one" / "file").read_text() == "whole"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "two"]


def test_damage_without_a_source_is_one_line(text, tmp_path, monkeypatch):
    monkeypatch.setenv("CLEARHEAD_DATA", str(tmp_path / "data"))
    own = tmp_path / "text"
    shutil.copytree(text, own)
    config = DataConfig(source=str(own), context=32, val_fraction=0.2, test_fraction=0.2)
    prepare(config)
    shutil.rmtree(own)
    harm(next((tmp_path / "data").glob("prepared/*/train.bin")), "flip")
    with warnings.catch_warnings(), pytest.raises(UserError, match="cannot be prepared again") as caught:
        prepare(config)
    assert "\n" not in str(caught.value)
