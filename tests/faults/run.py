"""`python -m tests.faults.run`: kills by the hundred, every fault of the table, ten thousand drawn calls; writes
docs/faults.md.

A story of kills is appended to `--out` as it ends, so that the command goes on where it stopped; the tests run anew.
`--quick` tells a few stories and draws few cases, into a passing folder, and leaves the page alone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from itertools import count
from pathlib import Path
from typing import Any

from tests.faults.page import page

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "faults.md"
SHARES = {"train": 0.40, "data": 0.36, "compare": 0.24}
"""What part of the kills strikes where."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], prog="python -m tests.faults.run")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--cases", type=int, default=10_000, help="drawn attention calls; of texts a twentieth each")
    parser.add_argument("--parts", nargs="+", default=["kills", "tests"], choices=["kills", "tests"])
    parser.add_argument(
        "--tests", nargs="+", default=["tests/faults"], help="run these only, and keep the others' outcomes"
    )
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
        run_tests(out / "tests.jsonl", asked.tests, quick=asked.quick)
    stories = read(out / "kills.jsonl")
    tests = list({test["test"]: test for test in read(out / "tests.jsonl")}.values())  # the latest of each
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
            struck, numbers = sum(len(s["kills"]) for s in told), {s["number"] for s in told}
            for number in (n for n in count() if n not in numbers):
                if struck >= share * kills:
                    break
                began = time.process_time()
                story = tell(stage, room, number)
                append(path, story.to_dict())
                struck += len(story.kills)
                print(
                    f"{room} {number}: {len(story.kills)} kills, {struck} so far, {time.process_time() - began:.1f} s"
                )


# ---- tests ----


def run_tests(path: Path, which: list[str], *, quick: bool) -> None:
    """Run the tests of this folder, unless `quick` the long ones too, and keep how each ended."""
    import pytest

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

    pytest.main([*which, *(["-m", "not full"] if quick else []), "-p", "no:cacheprovider"], plugins=[Listener()])


if __name__ == "__main__":
    raise SystemExit(main())
