"""Full disks, folders that cannot be written or read: one line, exit code 2, and the same command goes on later."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterable

import pytest

from clearhead.errors import UserError
from tests.faults import commands
from tests.faults.child import Ended, SmallDisk, forked, on_file_events, without_privilege
from tests.faults.kills import differences
from tests.faults.told import fault

NO_SPACE = r"no space left on the disk|No space left on device|File too large"


def one_line(text: str, *expected: str) -> None:
    """The last line is the command's complaint, says what is expected, and no traceback stands before it."""
    assert "Traceback" not in text, text
    lines = [line for line in text.splitlines() if line.startswith("clearhead: ")]
    assert len(lines) == 1, text
    assert "this is a bug" not in lines[0], lines[0]
    for pattern in expected:
        assert re.search(pattern, lines[0]), lines[0]


def within(action: Callable[[], None]) -> Ended:
    """Run checks in a child; its failed assertion is this test's."""
    ended = forked(lambda: action())
    assert ended.code == 0, ended.err
    return ended


def said(command: commands.Command) -> tuple[int, str]:
    """Exit code and standard error of a command that runs in this process."""
    import io

    kept, sys.stderr = sys.stderr, io.StringIO()
    try:
        return command(), sys.stderr.getvalue()
    finally:
        sys.stderr = kept


class Filled:
    """A disk that is full from the so-many-th opening of a file of some name on."""

    def __init__(self, disk: SmallDisk, pattern: str, count: int = 1) -> None:
        self.left, self.disk, self.pattern = count, disk, pattern
        on_file_events(disk.place, self.see)

    def see(self, event: str, path: str) -> None:
        if event in ("open", "os.mkdir") and self.left and re.search(self.pattern, path):
            self.left -= 1
            if not self.left:
                self.disk.fill()


def few(stages: Iterable[str], *kept: str) -> list[object]:
    """All of them, but only `kept` in the default suite."""
    return [pytest.param(stage, marks=() if stage in kept else pytest.mark.full) for stage in stages]


STAGES = {
    "the plan of the run": (r"/\.config\.json", 1),
    "its first lines": (r"\.metrics\.jsonl", 1),
    "the tokenizer": (r"tokenizer", 1),
    "weights": (r"part/model\.safetensors", 2),
    "the optimizer": (r"part/optimizer\.safetensors", 1),
    "the history": (r"part/history\.safetensors", 2),
    "the state": (r"part/state\.json", 2),
    "the result": (r"\.result\.json", 1),
}


@fault("full disk while a run writes: {case}", "one line, exit code 2; earlier checkpoints stay; goes on bit-equal")
@pytest.mark.parametrize("stage_of", few(STAGES, "the plan of the run", "weights", "the result"))
def test_full_disk_in_training(text, data, whole, tmp_path, stage_of):
    def action() -> None:
        disk = SmallDisk(tmp_path / "disk")
        print(disk.kind)
        run = disk.place / "run"
        Filled(disk, *STAGES[stage_of])
        code, error = said(commands.train(text, run, data))
        assert code == 2, error
        one_line(error, NO_SPACE)
        disk.free()
        assert said(commands.train(text, run, data))[0] == 0
        assert not differences(commands.trained(run), whole)

    print(within(action).out)


@fault(
    "full disk from a metrics line on", "one line, exit code 2; a torn line is cut off when the run goes on bit-equal"
)
def test_full_disk_at_a_line(text, data, whole, tmp_path):
    def action() -> None:
        disk = SmallDisk(tmp_path / "disk")
        run = disk.place / "run"
        from clearhead.train import recorder

        real = recorder.json.dumps

        def dumps(event, **rest):
            if isinstance(event, dict) and event.get("kind") == "train" and event["step"] == 5:
                disk.fill()
                return real({**event, "padding": "x" * 8192}, **rest)  # more than what is left of its last page
            return real(event, **rest)

        recorder.json.dumps = dumps
        code, error = said(commands.train(text, run, data))
        recorder.json.dumps = real
        assert code == 2, error
        one_line(error, NO_SPACE, "metrics.jsonl")
        disk.free()
        assert said(commands.train(text, run, data))[0] == 0
        assert not differences(commands.trained(run), whole)

    within(action)


DATA_STAGES = {
    "fetched texts": r"text2\.txt",
    "the fetched set's manifest": r"manifest",
    "prepared tokens": r"/train\.bin",
    "the index": r"documents\.json",
    "the header": r"header\.json",
}


@fault(
    "full disk while data is fetched and prepared: {case}",
    "one line, exit code 2; nothing half-made counts, and the same later",
)
@pytest.mark.parametrize("stage_of", [*DATA_STAGES])
def test_full_disk_in_data(stage, tmp_path, stage_of):
    wanted = stage.untouched("data")[0]

    def action() -> None:
        disk = SmallDisk(tmp_path / "disk")
        folder = disk.place / "data"
        (folder / "npm").mkdir(parents=True)
        shutil.copy(stage.archive, folder / "npm")
        Filled(disk, DATA_STAGES[stage_of])
        try:
            code, error = said(commands.data(stage.archive, folder))
        except UserError as refused:  # out of `prepare`, which is no command of its own
            code, error = 2, f"clearhead: {refused}"
        assert code == 2, error
        one_line(error, NO_SPACE)
        disk.free()
        assert not [p for p in folder.rglob("*") if p.is_dir() and p.name.startswith(".tmp")]
        assert said(commands.data(stage.archive, folder))[0] == 0
        assert not differences(commands.prepared(folder), wanted)

    within(action)


COMPARE_STAGES = {
    "plan": r"\.plan\.json",
    "resolved plan": r"\.resolved\.json",
    "tasks": r"\.task\.json",
    "session's line": r"sessions\.jsonl",
    "results.json": r"\.results\.json",
    "report": r"\.report\.html",
}


@fault("full disk while a comparison writes: {case}", "one line, exit code 2; ended runs stay; the same results later")
@pytest.mark.parametrize("stage_of", few(COMPARE_STAGES, "tasks"))
def test_full_disk_in_compare(stage, tmp_path, stage_of):
    wanted = stage.untouched("compare")[0]

    def action() -> None:
        disk = SmallDisk(tmp_path / "disk", "24m")  # the report holds plotly
        folder = disk.place / "c"
        Filled(disk, COMPARE_STAGES[stage_of])
        code, error = said(stage.command("compare", folder))
        assert code == 2, error
        one_line(error, NO_SPACE)
        disk.free()
        assert said(stage.command("compare", folder))[0] == 0
        assert not differences(commands.compared(folder), wanted)

    within(action)


@fault("full disk under a model's export (`save_model`)", "one line; the model that was there before is untouched")
def test_full_disk_under_save_model(tmp_path):
    from clearhead.models.config import ModelConfig
    from clearhead.models.io import load_model, save_model
    from clearhead.models.make import build_model

    small = [build_model(ModelConfig(layers=1, width=16, heads=2, context=32), seed) for seed in (0, 1)]

    def action() -> None:
        disk = SmallDisk(tmp_path / "disk")
        save_model(small[0], disk.place / "model")
        before = {p.name: p.read_bytes() for p in (disk.place / "model").iterdir()}
        disk.fill()
        with pytest.raises(UserError, match=NO_SPACE) as caught:
            save_model(small[1], disk.place / "model")
        assert "\n" not in str(caught.value)
        assert {p.name: p.read_bytes() for p in (disk.place / "model").iterdir()} == before
        disk.free()
        save_model(small[1], disk.place / "model")
        assert load_model(disk.place / "model").state_dict().keys() == small[1].state_dict().keys()

    within(action)


@fault("full disk under the export of a fine-tuned model", "one line; no folder appears under the wanted name")
def test_full_disk_under_an_export(tmp_path):
    import torch
    from safetensors.torch import save_file

    from clearhead.hf.export import _appearing

    def action() -> None:
        disk = SmallDisk(tmp_path / "disk")
        with pytest.raises(UserError, match=NO_SPACE) as caught, _appearing(disk.place / "model") as building:  # noqa: PT012
            disk.fill()
            save_file({"weight": torch.zeros(100_000)}, building / "model.safetensors")
        assert "nothing was written" in str(caught.value)
        assert not (disk.place / "model").exists()

    within(action)


@pytest.mark.full
@fault("full disk under an inspection's report", "one line, exit code 2; the report that was there before is untouched")
def test_full_disk_under_a_report(tmp_path, data, text):
    from clearhead.cli import main

    def action() -> None:
        disk = SmallDisk(tmp_path / "disk", "12m")
        commands.use_data(data)
        words = ["inspect", "--model", "tiny", "--out", str(disk.place / "r"), "--batch", "1", "--context", "16"]
        assert said(lambda: main(words))[0] == 0
        before = {p.name: p.read_bytes() for p in (disk.place / "r").iterdir()}
        disk.fill()
        code, error = said(lambda: main(words))
        assert code == 2, error
        one_line(error, NO_SPACE)
        assert {p.name: p.read_bytes() for p in (disk.place / "r").iterdir()} == before

    within(action)


@fault("standard output on a full disk", "one line, exit code 2")
def test_full_standard_output():
    from clearhead.cli import main

    def action() -> None:
        sys.stdout = open("/dev/full", "w")  # noqa: SIM115
        code, error = said(lambda: main(["explain", "softmax"]))
        sys.stdout = sys.__stdout__
        assert code == 2, (code, error)
        one_line(error, NO_SPACE)

    within(action)


@fault("{case}", "one line, exit code 2; nothing is changed, and the same command works once the rights are there")
@pytest.mark.parametrize("room", ["train into a read-only folder", "compare into a read-only folder", "read-only data"])
def test_a_folder_that_cannot_be_written(stage, text, data, tmp_path, room):
    place = tmp_path / "locked"
    place.mkdir()

    def action() -> None:
        if room == "read-only data":
            (place / "npm").mkdir()
            shutil.copy(stage.archive, place / "npm")
            command = commands.data(stage.archive, place)
        elif room.startswith("train"):
            command = commands.train(text, place / "run", data)
        else:
            command = stage.command("compare", place / "c")
        place.chmod(0o555)
        with without_privilege():
            code, error = said(command)
        assert code == 2, error
        one_line(error, "ermission denied|[Rr]ead-only")
        place.chmod(0o755)
        assert not {p.name for p in place.iterdir()} - {"npm"}

    within(action)


@fault("a run on a read-only disk", "one line, exit code 2; it runs once the disk can be written")
def test_a_read_only_disk(text, data, tmp_path):
    def action() -> None:
        disk = SmallDisk(tmp_path / "disk")
        if not disk.read_only(True):
            print("no mount may be made here")
            return
        command = commands.train(text, disk.place / "run", data, "--steps", "2")
        code, error = said(command)
        assert code == 2, error
        one_line(error, "[Rr]ead-only file system")
        assert disk.read_only(False)
        assert said(command)[0] == 0

    within(action)


@fault("{case} that may not be read", "one line, exit code 2, which names the file")
@pytest.mark.parametrize("what", few(("own text", "prepared tokens", "a run's config", "a checkpoint"), "own text"))
def test_a_file_that_may_not_be_read(text, data, tmp_path, what):
    from clearhead.cli import main

    own = tmp_path / "text"
    shutil.copytree(text, own)

    def action() -> None:
        place, run = tmp_path / "data", tmp_path / "run"
        assert said(commands.train(own, run, place))[0] == 0
        again = commands.train(own, run, place)
        path = {
            "own text": lambda: own / "0.txt",
            "prepared tokens": lambda: next(place.glob("prepared/*/train.bin")),
            "a run's config": lambda: run / "config.json",
            "a checkpoint": lambda: next(run.glob("checkpoint/*/model.safetensors")),
        }[what]()
        command = again
        if what == "a checkpoint":
            command = lambda: main(["evaluate", str(run)])
        elif what != "a run's config":
            command = commands.train(own, tmp_path / "another", place)
        path.chmod(0)
        with without_privilege():
            code, error = said(command)
        assert code == 2, error
        one_line(error, "ermission denied", path.name)
        path.chmod(0o644)
        assert said(again)[0] == 0

    within(action)


def test_a_complaint_about_a_bug_survives_a_full_disk(monkeypatch, capsys):
    """The traceback of a bug goes to the terminal where no file can take it."""
    from clearhead import cli

    def broken(arguments):
        raise RuntimeError("a bug")

    monkeypatch.setitem(cli.COMMANDS, "explain", broken)
    monkeypatch.setattr(cli.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError(28, "full")))
    assert cli.main(["explain"]) == 1
    error = capsys.readouterr().err
    assert "RuntimeError: a bug" in error
    assert "the traceback is above" in error
