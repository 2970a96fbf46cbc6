"""docs/faults.md, out of the outcomes that `run.py` has kept."""

from __future__ import annotations

import datetime
import platform
from collections import Counter
from typing import Any

HEAD = """\
# What happens when things go wrong

Written by `python -m tests.faults.run` (`--quick` for a look), which kills, starves and corrupts tiny jobs and holds
what they leave against jobs that nobody touched. "Bit-equal" means: weights, optimizer, history, metrics, results, all
but what hangs on the clock. `make test` runs a short version of it.

Last run: {date}, {machine}, Python {python}, torch {torch}. Full disks were {disks}.

## Kills

SIGKILL at seeded moments: just before a file is opened to be written, flushed, renamed or removed, or after an amount
of CPU time. After each kill the same command was given again, and at the end the result was compared. Jobs are forked
from a process that has imported everything, and so are a comparison's workers: what they write is the same.

| job | stories | kills | ended bit-equal |
| --- | --- | --- | --- |
{kills}

{struck}

## Faults

"One line" starts with `clearhead:` and goes to standard error, with exit code 2 and no traceback. In Python the same
is a `clearhead.errors.UserError`.

| fault | what happens | tested by (`tests/faults/`) | last run |
| --- | --- | --- | --- |
{faults}

## What is not covered

* A loss of power. Files are flushed before they get their name, and hashes are checked before anything is believed,
  but no machine was switched off.
* Prepared tokens that another program cuts short while a run has them mapped into memory: the system ends the run
  (SIGBUS) without a line of ours. The same command prepares them again and goes on.
* A process of several that hangs instead of dying: torch's own timeout ends the run, after half an hour.
* Network file systems, whose locks and renames follow other rules; Windows and macOS, where these tests do not run.
* Kills leave files that nothing reads: `.tmp-...` in the data folder (swept away once a day old and held by nobody)
  and in a run's folder, `.part` files, and at times one checkpoint more than usual.
"""


def page(stories: list[dict[str, Any]], tests: list[dict[str, Any]]) -> str:
    import torch

    rooms = {
        "train": "`clearhead train`: checkpoints, metrics, result",
        "data": "`clearhead data fetch`, then the first use: a set, a tokenizer, tokens",
        "compare": "`clearhead compare`, two workers: a worker, the command, or all at once",
    }
    lines = []
    for room, name in rooms.items():
        own = [s for s in stories if s["room"] == room]
        lines.append((name, len(own), sum(len(s["kills"]) for s in own), sum(not s["wrong"] for s in own)))
    total = ("all", *(sum(line[i] for line in lines) for i in (1, 2, 3)))
    kills = "\n".join(
        f"| {name} | {told} | {struck} | {equal} of {told} |" for name, told, struck, equal in [*lines, total]
    )
    first = {t["said"].split()[0] for t in tests if t["said"]}
    disks = sorted(first & {"tmpfs", "RLIMIT_FSIZE"})
    return HEAD.format(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        disks={"tmpfs": "small tmpfs mounts", "RLIMIT_FSIZE": "limits on file sizes (RLIMIT_FSIZE)"}.get(
            disks[0] if len(disks) == 1 else "", "not looked at" if not disks else " and ".join(disks)
        ),
        kills=kills,
        struck=struck(stories),
        faults="\n".join(rows(tests)),
    )


def struck(stories: list[dict[str, Any]]) -> str:
    """Where the kills struck, in a sentence."""
    where: Counter[str] = Counter()
    for kill in (kill for s in stories for kill in s["kills"]):
        if "killed before" in kill:
            where["the " + kill.split(" killed")[0].replace("all", "command and its workers at once")] += 1
        else:
            where["at a file event" if "event" in kill else "at an amount of CPU time"] += 1
    if not where:
        return "No kills were made."
    return "They struck: " + ", ".join(f"{what} {count} times" for what, count in where.most_common()) + "."


def rows(tests: list[dict[str, Any]]) -> list[str]:
    """A row for each fault; the cases of one test stand together where they say the same."""
    found: dict[tuple[str, str, str], Counter[str]] = {}
    for test in tests:
        if test["fault"] is not None:
            name = test["test"].split("[")[0].replace("tests/faults/", "")
            found.setdefault((*test["fault"], name), Counter())[test["outcome"]] += 1
    return [
        f"| {fault} | {happens} | `{name}` | {outcomes['passed']} of {outcomes.total() - outcomes['skipped']} passed |"
        for (fault, happens, name), outcomes in found.items()
    ]
