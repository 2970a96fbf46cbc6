"""Write docs/contract-table.md: what holds, by spec, backend and rule, from one run of the contract suite.

    python -m tests.contract_table            the whole sweep (7 minutes on two quiet cores)
    python -m tests.contract_table --sample   what `make test` runs
    python -m tests.contract_table --device cuda

Other arguments go to pytest. The rules stand in `contract.py` alone; this file only collects what pytest reports.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import torch

import clearhead
from tests.contract_cases import BACKEND_NAMES, REFUSED_PRODUCTS, SPECS

TARGET = Path(__file__).parents[1] / "docs" / "contract-table.md"
RULES = {
    1: "equals the reference",
    2: "causality",
    3: "cached decoding",
    4: "padding",
    5: "groups, cross",
    6: "low precision",
    7: "compile",
    8: "fresh memory",
    9: "dropout",
}
Place = tuple[str, str, int]  # spec, backend, rule


@dataclass
class Cell:
    """What the tests of one spec, backend and rule came to."""

    held: int = 0
    refused: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # first line of the error -> dtypes


def general(text: str) -> str:
    """A reason without the numbers of its case (of two digits or more)."""
    return re.sub(r"\b\d[\d.]+(e-?\d+)?\b", "N", text)


class Collector:
    """A pytest plugin: sorts each test's report by the place that `contract.py` recorded."""

    def __init__(self) -> None:
        self.cells: dict[Place, Cell] = defaultdict(Cell)
        self.shared: dict[int, Cell] = defaultdict(Cell)  # tests of a rule that are not about one spec
        self.tests = 0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # A failed set-up or tear-down counts as the test's own.
        if report.when != "call" and not report.failed:
            return
        told = dict(report.user_properties)
        place = told.get("place", {"rule": 0})
        self.tests += report.when == "call"
        if "spec" in place and "backend" in place:
            cell = self.cells[place["spec"], place["backend"], place["rule"]]
        else:
            cell = self.shared[place["rule"]]
        if report.failed or report.outcome == "skipped":
            reason = getattr(report, "wasxfail", "") or _message(report)
            cell.failed[general(reason)].add(place.get("dtype", ""))
            return
        reasons = [str(value) for name, value in report.user_properties if name == "refused"]
        for reason in reasons:
            cell.refused[general(reason)] += 1
        if not reasons or any(name == "ran" for name, _ in report.user_properties):
            cell.held += 1


def _message(report: pytest.TestReport) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(crash.message if crash is not None else report.longrepr).strip().splitlines()
    return (lines[1] if len(lines) > 1 and "cases:" in lines[0] else lines[0])[:200]


class Notes:
    """Footnotes, each text once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, texts: Iterable[str]) -> str:
        numbers = []
        for text in texts:
            if text not in self.texts:
                self.texts.append(text)
            numbers.append(str(self.texts.index(text) + 1))
        return f" [{', '.join(numbers)}]" if numbers else ""


def show(cell: Cell | None, notes: Notes) -> str:
    """The text of a cell."""
    if cell is None or not (cell.held or cell.refused or cell.failed):
        return "not run"
    if cell.failed:
        dtypes = ", ".join(sorted({d for dtypes in cell.failed.values() for d in dtypes if d}))
        return "**fails**" + (f" ({dtypes})" if dtypes else "") + notes.mark(cell.failed)
    return ("holds" if cell.held else "refused") + notes.mark(cell.refused)


def machine(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    return f"{platform.machine()} CPU, one thread a worker"


def document(found: Collector, *, whole: bool, device: str) -> str:
    """The page."""
    notes = Notes()
    rows = []
    for spec in SPECS:
        for backend in BACKEND_NAMES:
            cells = [show(found.cells.get((spec.text, backend, rule)), notes) for rule in RULES]
            rows.append(f"| `{spec}` | {backend} | " + " | ".join(cells) + " |")
    shared = [
        f"- rule {rule} ({RULES[rule]})" + (": " if rule else "") + show(found.shared[rule], notes)
        for rule in RULES
        if rule in found.shared
    ]
    reasons = sorted({error.split("': ", 1)[1] for error in REFUSED_PRODUCTS.values()})
    extent = (
        "the whole sweep" if whole else "the sample of `make test`; a cell tells of fewer cases than the whole sweep"
    )
    head = [
        "# What holds: the contract, by spec and backend",
        "",
        "Written by `make contract-table` from the results of `tests/contract.py` alone; do not edit.",
        f"{datetime.now(UTC):%Y-%m-%d}, clearhead {clearhead.__version__}, PyTorch {torch.__version__}, "
        f"Python {platform.python_version()}, {machine(device)}. {found.tests} tests: {extent}.",
        "",
        "*holds*: every case that the backend served passed, in every dtype of the rule. *refused*: the backend serves",
        "none of the cases, and says why. A number in brackets names a note: why some cases, or all, are refused.",
        'A named backend that refuses never falls back; with `backend="auto"` the next one serves. Rule 10 (saving and',
        "loading are identities) is about modules and is tested with the models.",
        "",
        "| spec | backend | " + " | ".join(f"{n}. {name}" for n, name in RULES.items()) + " |",
        "|" + "---|" * (2 + len(RULES)),
    ]
    tail = ["", "## Notes", ""]
    tail += [f"{i}. {text}" for i, text in enumerate(notes.texts, 1)] or ["None."]
    tail += ["", "## Tests of a rule as a whole", "", *shared]
    tail += ["", "## Products that mean nothing", ""]
    tail += [f"{len(REFUSED_PRODUCTS)} products are refused when the spec is read:", ""]
    tail += [f"- {reason}" for reason in reasons]
    return "\n".join([*head, *rows, *tail, ""])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.contract_table", description=__doc__.splitlines()[0])
    parser.add_argument("--sample", action="store_true", help="only what `make test` runs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, default=TARGET)
    told, rest = parser.parse_known_args(arguments)
    options = ["-q", "--device", told.device, str(Path(__file__).with_name("contract.py"))]
    if told.sample:
        options += ["-m", "not full"]
    if told.device == "cpu" and importlib.util.find_spec("xdist") is not None and "-n" not in rest:
        options += ["-n", "2"]
    found = Collector()
    code = pytest.main([*options, *rest], plugins=[found])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return int(code)  # interrupted, or nothing collected: the table on disk stays as it is
    told.output.parent.mkdir(exist_ok=True)
    told.output.write_text(document(found, whole=not told.sample, device=told.device))
    print(f"wrote {told.output}")
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
