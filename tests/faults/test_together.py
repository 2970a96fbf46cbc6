"""Two commands at once, clocks that jump, batches that are not numbers."""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path

import pytest

from clearhead.cli import main
from clearhead.compare.layout import Layout
from clearhead.compare.run import hold
from clearhead.train import checkpoint as store
from tests.faults import commands
from tests.faults.child import Child, forked, on_file_events
from tests.faults.kills import differences
from tests.faults.test_disk import one_line, said, within
from tests.faults.told import fault
from tests.faults.workers import children, fork_workers


def wait_for(path: Path, within: float = 120.0) -> None:
    deadline = time.monotonic() + within
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not come"
        time.sleep(0.02)


@fault("two `clearhead train` in one folder at once", "the second: one line, exit code 2; the first ends bit-equal")
def test_two_trainings_in_one_folder(text, data, whole, tmp_path):
    run = tmp_path / "run"

    def held() -> int:
        def see(event: str, path: str) -> None:
            if event == "os.rename" and path.endswith(".step-00000002.part"):
                (tmp_path / "there").touch()
                wait_for(tmp_path / "go")

        on_file_events(run, see)
        return commands.train(text, run, data)()

    first = Child(held)
    wait_for(tmp_path / "there")
    second = forked(commands.train(text, run, data))
    (tmp_path / "go").touch()
    assert second.code == 2, second
    one_line(second.err, r"is in use by another process \(process \d+\); wait for it or use another folder")
    assert first.wait().code == 0
    assert not differences(commands.trained(run), whole)


@fault("two `clearhead compare` in one folder at once", "the second: one line, exit code 2; nothing is touched")
def test_two_comparisons_in_one_folder(text, data, tmp_path):
    def action() -> None:
        (tmp_path / "c").mkdir()
        with hold(Layout(tmp_path / "c")):
            code, error = said(commands.compare(text, tmp_path / "c", data))
        assert code == 2, error
        one_line(error, "another `clearhead compare` is at work")
        assert [p.name for p in (tmp_path / "c").iterdir()] == [".lock"]

    within(action)


@fault("a comparison restarted while workers of a killed one still save", "new workers wait for them; the same results")
def test_a_comparison_restarted_at_once(stage, tmp_path):
    folder, wanted = tmp_path / "c", stage.untouched("compare")[0]

    def slow(number: int, run: Path) -> None:
        def see(event: str, path: str) -> None:
            if event == "os.rename" and path.endswith("step-00000002.part"):
                (tmp_path / "there").touch()
                time.sleep(0.7)  # longer than the next worker needs to reach this folder

        on_file_events(run, see)

    first = Child(stage.command("compare", folder, slow))
    wait_for(tmp_path / "there")
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    again = forked(stage.command("compare", folder))
    assert again.code == 0, again.err
    assert not list(folder.glob("runs/*/*/crash.json"))
    assert not differences(commands.compared(folder), wanted)


@fault("two processes prepare the same text at once", "both end; one copy stays, whole")
def test_two_preparations_at_once(stage, tmp_path):
    wanted = stage.untouched("data")[0]
    two = [Child(stage.command("data", tmp_path / "data")) for _ in range(2)]
    for child in two:
        ended = child.wait()
        assert ended.code == 0, ended.err
    assert not differences(commands.prepared(tmp_path / "data"), wanted)


@fault("the wall clock {case} during a run", "nothing hangs on it: bit-equal")
@pytest.mark.parametrize("jump", ["goes backwards", "jumps ten years ahead"])
def test_clock_jumps(text, whole, tmp_path, jump):
    def jumping() -> int:
        real, calls = time.time, []

        def clock() -> float:
            calls.append(1)
            return real() - 3600.0 * len(calls) if "back" in jump else real() + 3.2e8 * (len(calls) % 2)

        time.time = clock
        return commands.train(text, tmp_path / "run", tmp_path / "data")()

    ended = forked(jumping)
    assert ended.code == 0, ended.err
    assert not differences(commands.trained(tmp_path / "run"), whole)


@pytest.mark.full
@fault("the wall clock jumps during a comparison", "nothing hangs on it: the same results")
def test_clock_jumps_in_a_comparison(stage, tmp_path):
    def jumping() -> int:
        real, calls = time.time, []

        def clock() -> float:
            calls.append(1)
            return real() + (-1e8, 1e8)[len(calls) % 2]

        time.time = clock
        return stage.command("compare", tmp_path / "c")()

    ended = forked(jumping)
    assert ended.code == 0, ended.err
    assert not differences(commands.compared(tmp_path / "c"), stage.untouched("compare")[0])


# ---- not a number ----


def poisoned(steps: set[int], then: commands.Command) -> commands.Command:
    """The command with a loss that is NaN in some steps (numbered from 0), as a bad batch would make it."""

    def command() -> int:
        from clearhead.train.step import MicroBatch
        from clearhead.train.tasks.causal_lm import CausalLM

        read, loss = CausalLM.read, MicroBatch.loss
        bad = set()

        def reading(self, step, world):
            batches, valid = read(self, step, world)
            bad.clear()
            if step in steps:
                bad.update(id(batch) for batch in batches)
            return batches, valid

        def losing(self, called):
            found, plain = loss(self, called)
            return (found * math.nan, plain * math.nan) if id(self) in bad else (found, plain)

        CausalLM.read, MicroBatch.loss = reading, losing
        return then()

    return command


@fault(
    "NaN from one bad batch", "the step is skipped and counted; weights and optimizer are as they were; resuming too"
)
def test_a_bad_batch(text, data, tmp_path):
    one = tmp_path / "one"
    ended = forked(poisoned({3}, commands.train(text, one, data, "--train.checkpoint-every", "1")))
    assert ended.code == 0, ended.err
    got = commands.trained(one)
    assert got["history"]["skipped"] == [0, 0, 0, 1, 0, 0]
    assert got["result"]["summary"]["skipped_steps"] == 1
    newest = store.read(store.newest_model(one))
    for file in (store.MODEL, store.OPTIMIZER):
        assert all(tensor.isfinite().all() for tensor in newest.tensors[file].values()), file

    two = tmp_path / "two"

    def dying() -> int:
        def see(event: str, path: str) -> None:
            if event == "os.rename" and path.endswith(".step-00000005.part"):
                os.kill(os.getpid(), signal.SIGKILL)

        on_file_events(two, see)
        return poisoned({3}, commands.train(text, two, data, "--train.checkpoint-every", "1"))()

    assert forked(dying).code == -signal.SIGKILL
    before, after = (store.read(two / "checkpoint" / f"step-0000000{step}").tensors for step in (3, 4))
    for file in (store.MODEL, store.OPTIMIZER):
        assert all(after[file][name].equal(tensor) for name, tensor in before[file].items()), file
    assert forked(poisoned({3}, commands.train(text, two, data, "--train.checkpoint-every", "1"))).code == 0
    assert not differences(commands.trained(two), got)


@fault("NaN from every batch on", "diverged is a result: exit code 0, the checkpoint before it stays, the same again")
def test_bad_batches_without_end(text, data, tmp_path):
    run = tmp_path / "run"
    command = poisoned(set(range(2, 99)), commands.train(text, run, data, "--train.diverged-after", "2"))
    first = forked(command)
    assert first.code == 0, first.err
    assert "diverged; loss or gradient not finite in 2 steps in a row, to step 4" in " ".join(first.out.split())
    assert [p.name for p in store.checkpoints(run)] == ["step-00000002"]
    newest = store.read(store.newest_model(run))
    assert all(tensor.isfinite().all() for tensor in newest.tensors[store.OPTIMIZER].values())
    result = (run / "result.json").read_text()
    assert forked(command).out == first.out
    assert (run / "result.json").read_text() == result


@pytest.mark.full
@fault("NaN in one arm of a comparison", "the report and results.json say that the arm diverged; the others stand")
def test_an_arm_that_diverges(stage, text, data, tmp_path):
    folder = tmp_path / "c"
    words = ("--arm", "hot: optim.lr=1e30 optim.clip_norm=none", "--steps", "12")
    ended = forked(commands.compare(text, folder, data, *words, prepare_process=fork_workers))
    assert ended.code == 0, ended.err
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    hot = next(arm for arm in results["arms"] if arm["name"] == "hot")
    assert hot["status"]["diverged"] == 2
    assert "hot diverged" in (folder / "report.html").read_text()


OF_THE_LIBRARIES = ("torch/_inductor", "torch._inductor", "multiprocessing.resource_tracker")
"""What other tests of this process may have started for its whole life."""


def test_no_command_keeps_a_child():
    kept = [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in children(os.getpid())]
    assert [line for line in kept if not any(name in line for name in OF_THE_LIBRARIES)] == []


def test_an_unreadable_option_is_no_bug(capsys):
    assert main(["train", "--out", "/dev/null/run", "--model", "tiny", "--steps", "1", "--data", "python-stdlib"]) == 2
    one_line(capsys.readouterr().err, "/dev/null")
