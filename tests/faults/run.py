"""`python -m tests.faults.run`: kills by the hundred, every fault of the table, ten thousand drawn calls; writes
docs/faults.md.

A story of kills is appended to `--out` as it ends, and so is the outcome of each test, so that the command goes on where
it stopped. `--quick` tells a few stories and draws few cases, into a passing folder, and leaves the page alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
SHARES = {"train": 0.38, "data": 0.32, "compare": 0.30}
"""What part of the kills strikes where."""
TESTS = ["tests/faults"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m tests.faults.run")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cases", type=int, default=10_000, help="drawn attention calls; of texts a twentieth each")
    parser.add_argument("--parts", nargs="+", default=["kills", "tests"], choices=["kills", "tests"])
    parser.add_argument("--out", type=Path, default=Path("runs/faults"), help="where the outcomes are kept")
    parser.add_argument("--quick", action="store_true")
    asked = parser.parse_args()
    os.chdir(ROOT)
    os.environ["CLEARHEAD_CASES"] = "100" if asked.quick else str(asked.cases)
    out = Path(tempfile.mkdtemp()) if asked.quick else asked.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if "kills" in asked.parts:
        tell_stories(out / "kills.jsonl", 6 if asked.quick else asked.kills)
    if "tests" in asked.parts:
        run_tests(out / "tests.jsonl", quick=asked.quick)
    stories, tests = read(out / "kills.jsonl"), read(out / "tests.jsonl")
    wrong = [s for s in stories if s["wrong"]] + [t for t in tests if t["outcome"] == "failed"]
    if asked.quick:
        shutil.rmtree(out)
    else:
        PAGE.write_text(page(stories, tests), encoding="utf-8")
        print(f"{PAGE.relative_to(ROOT)} is written")
    print(f"{sum(len(s['kills']) for s in stories)} kills, {len(tests)} tests, {len(wrong)} went wrong")
    for found in wrong:
        print(json.dumps(found))
    return int(bool(wrong))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def append(path: Path, values: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.write(json.dumps(values) + "\n")


# ---- kills ----


def tell_stories(path: Path, kills: int) -> None:
    """Tell stories until each room has its share of the kills; those in the file are not told again."""
    import torch

    from tests.faults.kills import Stage, tell

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        stage = Stage(Path(place))
        for room, share in SHARES.items():
            told = [s for s in read(path) if s["room"] == room]
            struck, number = sum(len(s["kills"]) for s in told), len(told)
            while struck < share * kills:
                began = time.process_time()
                story = tell(stage, room, number)
                append(path, story.to_dict())
                struck, number = struck + len(story.kills), number + 1
                print(
                    f"{room} {number}: {len(story.kills)} kills, {struck} so far, {time.process_time() - began:.1f} s"
                )


# ---- tests ----


def run_tests(path: Path, *, quick: bool) -> None:
    """Run the tests of this folder, the long ones too, but for those that have passed before under the same source."""
    import pytest

    path.unlink(missing_ok=True)

    class Listener:
        def pytest_runtest_logreport(self, report: Any) -> None:
            if report.when == "call" or (report.when == "setup" and report.outcome != "passed"):
                found = self.told.get(report.nodeid)
                what = (
                    None
                    if found is None
                    else [text.replace("{case}", self.case.get(report.nodeid, "")) for text in found]
                )
                said = report.capstdout if "disk" in report.nodeid else ""
                append(
                    path, {"test": report.nodeid, "fault": what, "outcome": report.outcome, "said": said.strip()[:80]}
                )

        def pytest_collection_modifyitems(self, items: list[Any]) -> None:
            self.told = {item.nodeid: getattr(item.function, "fault", None) for item in items}
            self.case = {item.nodeid: item.callspec.id for item in items if hasattr(item, "callspec")}

    pytest.main([*TESTS, *(["-m", "not full"] if quick else []), "-p", "no:cacheprovider"], plugins=[Listener()])


# ---- the page ----

HEAD = """\
# What happens when things go wrong

Written by `python -m tests.faults.run` (about {minutes} minutes of one core; `--quick` for a look), which kills, starves and
corrupts tiny jobs and holds what they leave against jobs that nobody touched. "Bit-equal" means: weights, optimizer, history,
metrics, results, all but the clock. `make test` runs a short version of each row.

Last run: {date}, {machine}, Python {python}, torch {torch}. Full disks were {disks}.

## Kills

SIGKILL at seeded moments: just before a file is opened, flushed, renamed or removed, or after an amount of CPU time. After
each kill the same command was given again, and at the end the result was compared. Jobs are forked from a process that has
imported everything; a comparison's workers are forked too.

| job | stories | kills | ended bit-equal |
| --- | --- | --- | --- |
{kills}

{struck}

## Faults

| fault | what happens | tested by | last run |
| --- | --- | --- | --- |
{faults}

Errors are one line that starts with `clearhead:`, on standard error, with exit code 2; there is no traceback. As a library the
same is a `clearhead.errors.UserError`.

## What is not covered

* A loss of power: files are flushed before they get their name, and hashes are checked before anything is believed, but no
  machine was switched off.
* Prepared tokens that another program cuts short while they are mapped into memory: the system ends the run (SIGBUS) without a
  line of ours; the same command prepares them again and goes on.
* Kills leave files that nothing reads: `.tmp-...` in the data folder (swept away after a day, unless a process holds them) and
  in a run's folder, and a checkpoint more than usual.
* A peer that hangs instead of dying: torch's own timeout of the process group ends the run, after half an hour.
* Network file systems, whose locks and renames follow other rules.
"""


def page(stories: list[dict[str, Any]], tests: list[dict[str, Any]]) -> str:
    import datetime

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
    disks = sorted({t["said"] for t in tests if t["said"] in ("tmpfs", "RLIMIT_FSIZE")})
    return HEAD.format(
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        machine=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        torch=torch.__version__,
        minutes=6,
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
            where[kill.split(" killed")[0].replace("all", "command and workers at once")] += 1
        else:
            where["a file event" if "event" in kill else "an amount of CPU time"] += 1
    if not where:
        return "No kills were made."
    return "They struck at: " + ", ".join(f"{what} {count} times" for what, count in where.most_common()) + "."


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


if __name__ == "__main__":
    raise SystemExit(main())
