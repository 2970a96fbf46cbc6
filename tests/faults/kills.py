"""Stories of kills: a command is killed by SIGKILL at seeded moments, goes on by itself each time, and is held against
one that nobody touched.

A moment is a file event (just before a rename, an opening, a flush, a removal: where a half-written file would come
from) or an amount of CPU time (anywhere). In a comparison a worker, the command, or both at once are killed.
"""

from __future__ import annotations

import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tests.faults import commands
from tests.faults.child import Child, Ended, count_events, die_at, forked, suicide
from tests.faults.commands import Command
from tests.faults.workers import fork_workers, kill_group

ROOMS = ("train", "data", "compare")
MOST = 3
"""Kills in a story."""


@dataclass
class Story:
    """What happened: where each kill struck, and what was wrong at the end (nothing, one hopes)."""

    room: str
    number: int
    kills: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Stage:
    """The place of all stories: texts, prepared data, and what the commands give when nobody touches them."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.text = commands.write_texts(place / "text")
        self.archive = place / "faults-words-1.0.tgz"
        commands.add_set(self.archive)
        self.data = place / "data"  # of train and compare, whose stories are not about it

    def command(self, room: str, folder: Path, begin: Callable[[int, Path], None] | None = None) -> Command:
        """The command of a room, at work in `folder`."""
        if room == "train":
            return commands.train(self.text, folder, self.data)
        if room == "data":
            return commands.data(self.archive, folder)
        return commands.compare(self.text, folder, self.data, prepare_process=lambda: fork_workers(begin))

    def result(self, room: str, folder: Path) -> dict[str, Any]:
        return {"train": commands.trained, "data": commands.prepared, "compare": commands.compared}[room](folder)

    @cache  # noqa: B019 (one stage in a process)
    def untouched(self, room: str) -> tuple[dict[str, Any], list[str], float]:
        """The result of a run that is not killed, its file events (of a comparison: the command's own), CPU seconds."""
        if room != "data":
            assert forked(commands.train(self.text, self.place / "first", self.data)).code == 0  # prepares the text
        folder = self.place / f"untouched-{room}"
        ended, events = count_events(folder, self.command(room, folder))
        assert ended.code == 0, ended.err
        timed = Child(self.command(room, self.place / f"timed-{room}"))
        spent = 0.0
        while timed.poll() is None:
            spent = max(spent, timed.cpu_seconds())
            time.sleep(0.002)
        return self.result(room, folder), events, spent


def tell(stage: Stage, room: str, number: int) -> Story:
    """One story: up to three kills, then the command to its end, then the comparison."""
    draw = random.Random(f"{room} {number}")
    wanted, events, spent = stage.untouched(room)
    story, folder = Story(room, number), stage.place / f"{room}-{number}"
    for _ in range(draw.randint(1, MOST)):
        said = kill_in_compare(stage, folder, draw, len(events)) if room == "compare" else None
        if room != "compare":
            said = kill_once(stage, room, folder, draw, events, spent)
        if said is None:
            break  # it ended before its moment came
        story.kills.append(said)
    ended = forked(stage.command(room, folder))
    if ended.code:
        story.wrong.append(f"the command again: exit code {ended.code}: {ended.last}")
    else:
        try:
            story.wrong += differences(stage.result(room, folder), wanted)
        except Exception as error:
            story.wrong.append(f"the result cannot be read: {type(error).__name__}: {error}")
    if not story.wrong:
        shutil.rmtree(folder)
    return story


def kill_once(
    stage: Stage, room: str, folder: Path, draw: random.Random, events: list[str], spent: float
) -> str | None:
    """Kill the command at one moment; say where, or None when it ended first."""
    command = stage.command(room, folder)
    if draw.random() < 0.6:
        moment = draw.randint(1, len(events))

        def dying() -> int:
            die_at(folder, moment)
            return command()

        ended, where = forked(dying), f"before file event {moment} of {len(events)}"
    else:
        seconds = draw.uniform(0.0, spent)
        child = Child(command)
        child.kill_after(seconds)
        ended, where = child.wait(), f"after {seconds:.3f} s of CPU time"
    return outcome(ended, where)


def kill_in_compare(stage: Stage, folder: Path, draw: random.Random, events: int) -> str | None:
    """Kill the command, a worker, or all at once, at a file event of the command or of a worker."""
    who = draw.choice(("command", "worker", "all"))
    counted = "command" if who == "command" else "worker" if who == "worker" else draw.choice(("command", "worker"))
    number, moment = draw.randint(1, 4), draw.randint(1, 40)  # the probe and workers make some 50 file events each
    own = draw.randint(1, events)
    sign = folder.with_name(f"{folder.name}.killed")
    sign.unlink(missing_ok=True)

    def strike(parent: int) -> None:
        os.close(os.open(sign, os.O_CREAT | os.O_WRONLY))
        if who == "all":
            kill_group(parent)
        suicide()

    def begin(which: int, run: Path) -> None:
        if counted == "worker" and which == number:
            die_at(folder, moment, lambda: strike(os.getppid()))

    def dying() -> int:
        if counted == "command":
            pid = os.getpid()
            die_at(folder, own, lambda: strike(pid) if os.getpid() == pid else None)
        return stage.command("compare", folder, begin)()

    ended = forked(dying)
    if not sign.exists():
        return outcome(ended, "")
    at = f"file event {own} of the command" if counted == "command" else f"file event {moment} of worker {number}"
    return f"{who} killed before {at}"


def outcome(ended: Ended, where: str) -> str | None:
    if ended.code == -9:
        return where
    return None if ended.code == 0 else f"not killed but ended with {ended.code}: {ended.last}"


def differences(got: Any, wanted: Any, path: str = "") -> list[str]:
    """Where two results differ, the first few places."""
    return list(_differences(got, wanted, path))[:4]


def _differences(got: Any, wanted: Any, path: str) -> Iterator[str]:
    if isinstance(got, dict) and isinstance(wanted, dict):
        for key in sorted({*got, *wanted}, key=str):
            yield from _differences(got.get(key), wanted.get(key), f"{path}/{key}")
    elif isinstance(got, list) and isinstance(wanted, list) and len(got) == len(wanted):
        for index, (a, b) in enumerate(zip(got, wanted)):
            yield from _differences(a, b, f"{path}/{index}")
    elif got != wanted and not (got != got and wanted != wanted):  # a NaN is equal to a NaN here
        yield f"{path}: {str(got)[:60]} instead of {str(wanted)[:60]}"
