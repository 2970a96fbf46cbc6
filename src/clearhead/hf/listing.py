"""`clearhead hf list`: architecture x spec -> works, refused because ..., or fails a check; found by running each.

Nothing is hard-coded: a cell says what happened when a tiny random model of that architecture was patched, run through
`checks.py` and unpatched. Results are kept in a JSON file cell by cell, so that a run that was stopped goes on; a cell
made by other versions, or by other source, is made again.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

from clearhead._disk import disk_errors, write_whole
from clearhead.attention.spec import AttentionSpec
from clearhead.errors import UserError
from clearhead.hf import zoo
from clearhead.hf.zoo_entries import ENTRIES, Entry

SPECS = (
    "softmax",
    "laser",
    "self_adjust",
    "softmax+selective",
    "window:8",
    "bigbird:block_size=4,random_blocks=1",
    "laser+bigbird:block_size=4,random_blocks=1",
    "performer:features=16",
)
"""The columns: each choice of the algebra once, sized so that patterns hide something of the zoo's 40 tokens."""
Status = Literal["works", "mended", "as own", "refused", "fails", "absent"]
EQUALS = "equals its own attention"


@dataclass(frozen=True)
class Cell:
    """What happened to one architecture under one spec.

    "works": every check passed. "mended": every check passed but for equality with the model's own attention, which
    itself fails one of them. "as own": some failed, and the same fail with the model's own attention. "refused": the
    patch said no, and why. "fails": a check failed that the model's own attention passes, or a crash. "absent": the
    installed transformers has no such architecture.
    """

    architecture: str
    spec: str
    status: Status
    reason: str = ""
    checks: tuple[str, ...] = ()


@dataclass
class Table:
    """The cells with what they were made by."""

    versions: dict[str, str]
    cells: dict[tuple[str, str], Cell] = field(default_factory=dict)

    def count(self, status: Status) -> int:
        """How many cells have this status."""
        return sum(cell.status == status for cell in self.cells.values())


def try_cell(entry: Entry, spec: str) -> Cell:
    """Patch a fresh model of this architecture, run every check, unpatch."""
    from clearhead import hf
    from clearhead.hf import checks

    try:
        model = zoo.build(entry)
    except UserError as error:
        return Cell(entry.name, spec, "absent", str(error))
    before = checks.Before.of(model, entry)
    try:
        report = hf.patch(model, spec, probe=zoo.inputs(entry))
    except UserError as error:
        crashed = error.__cause__ is not None and str(error).startswith("the probing forward")
        return Cell(entry.name, spec, "fails" if crashed else "refused", " ".join(str(error).split()))
    except Exception as error:
        return Cell(entry.name, spec, "fails", _crash("patch", error))
    passed: list[str] = []
    bad: list[str] = []
    own: list[str] = []
    for name, run in _checks(model, entry, spec, report, before, hf.unpatch):
        try:
            problem = run()
        except Exception as error:
            problem = _crash(name, error)
        if problem is None:
            passed.append(name)
        elif name in checks.BEHAVIOUR and _fails_unpatched(entry, name):
            own.append(f"{name}: {problem} (its own attention fails this check as well)")
        else:
            bad.append(f"{name}: {problem}")
    if len(bad) == 1 and bad[0].startswith(EQUALS) and (broken := _own_problem(entry)):
        reason = f"unlike its own attention, which fails a check: {broken}"
        return Cell(entry.name, spec, "mended", reason, tuple(passed))
    status: Status = "fails" if bad else "as own" if own else "works"
    return Cell(entry.name, spec, status, "; ".join(bad + own), tuple(passed))


def _checks(
    model: Any, entry: Entry, spec: str, report: Any, before: Any, unpatch: Callable[[Any], None]
) -> Iterator[tuple[str, Callable[[], str | None]]]:
    """In the order in which they run: a temperature starts as the identity and is then moved."""
    from clearhead.hf import checks

    parsed = AttentionSpec.parse(spec)
    yield "every layer called", lambda: checks.every_layer_called(report, entry)
    if AttentionSpec(weights=parsed.weights, read=parsed.read, pattern=parsed.pattern) == AttentionSpec():
        yield EQUALS, lambda: checks.equals_own(model, entry, before)
    checks.stir_added(model, before)
    for name, check in checks.BEHAVIOUR.items():
        yield name, lambda check=check: check(model, entry)  # type: ignore[misc]
    yield "gradients", lambda: checks.gradients(model, entry, tuple(layer.name for layer in report.layers))

    def back() -> str | None:
        unpatch(model)
        return checks.unpatched(model, entry, before)

    yield "unpatch", back


def _crash(where: str, error: Exception) -> str:
    return f"{where} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}"


_OWN: dict[tuple[str, str], str | None] = {}


def _fails_unpatched(entry: Entry, name: str) -> str | None:
    """The problem that the model has with this check as it is."""
    from clearhead.hf import checks

    if (entry.name, name) not in _OWN:
        try:
            _OWN[entry.name, name] = checks.BEHAVIOUR[name](zoo.build(entry), entry)
        except Exception as error:
            _OWN[entry.name, name] = _crash(name, error)
    return _OWN[entry.name, name]


def _own_problem(entry: Entry) -> str | None:
    from clearhead.hf import checks

    found = ((name, _fails_unpatched(entry, name)) for name in checks.BEHAVIOUR)
    return next((f"{name}: {problem}" for name, problem in found if problem), None)


# ---- a table, kept as it grows ----


def versions() -> dict[str, str]:
    """What the cells depend on: libraries, and the source of attention and patch."""
    import torch

    source = hashlib.sha256()
    root = Path(__file__).parents[1]
    for folder in ("attention", "kernels", "layers", "memory", "hf"):
        for file in sorted((root / folder).rglob("*.py")):
            source.update(file.read_bytes())
    return {
        "transformers": zoo.transformers_or_error().__version__,
        "torch": torch.__version__.split("+")[0],
        "source": source.hexdigest()[:12],
    }


def make_table(
    architectures: Sequence[str] = (),
    specs: Sequence[str] = (),
    *,
    keep: Path | None = None,
    on_cell: Callable[[Cell], None] | None = None,
) -> Table:
    """Make the cells of these architectures and specs (default: all, and `SPECS`); `keep` is the JSON that they go to.

    Cells that `keep` holds from the same versions are not made again; those of other rows and columns stay.
    """
    names = list(architectures) or [name for name, entry in ENTRIES.items() if not entry.extra]
    entries = [zoo.find(name) for name in names]
    columns = [str(AttentionSpec.parse(spec)) for spec in specs or SPECS]
    table = Table(versions())
    if keep is not None and keep.exists():
        table.cells.update(_read(keep, table.versions))
    wanted: dict[tuple[str, str], Cell] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in entries:
            for spec in columns:
                key = (entry.name, spec)
                made = key not in table.cells
                if made:
                    table.cells[key] = try_cell(entry, spec)
                wanted[key] = table.cells[key]
                if on_cell is not None:
                    on_cell(wanted[key])
            if keep is not None:
                _write(keep, table)
    return Table(table.versions, wanted)


def _read(path: Path, wanted: dict[str, str]) -> dict[tuple[str, str], Cell]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        cells = [Cell(**{**cell, "checks": tuple(cell["checks"])}) for cell in stored["cells"]]
        same = stored["versions"] == wanted
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file that `clearhead hf list --json` wrote ({error}); name another") from None
    return {(cell.architecture, cell.spec): cell for cell in cells} if same else {}


def _write(path: Path, table: Table) -> None:
    content = {"versions": table.versions, "cells": [asdict(cell) for cell in table.cells.values()]}
    with disk_errors(f"{path}", "the architectures that are in it stay"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=1) + "\n")


# ---- Markdown ----

WORDS: dict[Status, str] = {
    "works": "works",
    "mended": "mended",
    "as own": "as own",
    "refused": "refused",
    "fails": "FAILS",
    "absent": "-",
}


def notes(table: Table) -> dict[str, int]:
    """The reasons that stand in the table, numbered in the order in which they occur."""
    found: dict[str, int] = {}
    for cell in table.cells.values():
        if cell.reason and cell.status != "works":
            found.setdefault(cell.reason, len(found) + 1)
    return found


def rows_of(table: Table) -> tuple[list[str], list[str]]:
    """Architectures and specs, in the order of the cells."""
    return list(dict.fromkeys(a for a, _ in table.cells)), list(dict.fromkeys(s for _, s in table.cells))


def markdown(table: Table, command: str = "clearhead hf list --markdown docs/hf-architectures.md") -> str:
    """The page: what a cell means, one table for each kind of architecture, the reasons."""
    architectures, specs = rows_of(table)
    numbered = notes(table)
    lines = [
        "# Architectures of transformers, patched",
        "",
        f"Made by `{command}` with transformers {table.versions['transformers']}, torch {table.versions['torch']} on "
        f"{date.today().isoformat()}: a tiny random model of each architecture is built from a config, patched with "
        "`clearhead.hf.patch`, checked and unpatched. Nothing here is written by hand.",
        "",
        f"**works** ({table.count('works')} cells of {len(table.cells)}): every layer of attention called the patch; "
        "an edit at padding tokens, left or right, changes nothing at real ones, and a sequence padded on the right "
        "gives what it gives alone; an edit of later tokens changes nothing before (decoders); decoding through the "
        "cache, token by token and in a chunk, equals the full forward (decoders); every projection of attention gets "
        "a finite gradient; under softmax, and under a temperature at its start, outputs equal the model's own; "
        "`unpatch` gives back the outputs bit by bit. Tolerance 1e-5 in float32. A temperature is moved from its start "
        "before the other checks. **mended**: all but equality, for the model's own attention fails a check that the "
        "patched one passes. **as own**: a check fails that the model's own attention fails too. **refused**: `patch` "
        "raises, with the reason below. **FAILS**: a bug.",
        "",
    ]
    for kind in dict.fromkeys(ENTRIES[name].kind for name in architectures):
        lines += [f"## {KINDS[kind]}", ""]
        lines += ["| architecture | class | " + " | ".join(f"`{spec}`" for spec in specs) + " |"]
        lines += ["|---" * (len(specs) + 2) + "|"]
        for name in architectures:
            entry = ENTRIES[name]
            if entry.kind != kind:
                continue
            words = []
            for spec in specs:
                cell = table.cells.get((name, spec))
                number = numbered.get(cell.reason) if cell is not None else None
                word = "" if cell is None else WORDS[cell.status]
                words.append(f"{word} ({number})" if number else word)
            lines.append(f"| {name} | {entry.model} | " + " | ".join(words) + " |")
        lines.append("")
    if numbered:
        lines += ["## Reasons", ""]
        lines += [f"{number}. {reason}" for reason, number in numbered.items()]
        lines.append("")
    return "\n".join(lines)


KINDS = {
    "decoder": "Decoders",
    "encoder": "Encoders",
    "seq2seq": "Encoder-decoders",
    "vision": "Images",
    "speech": "Sound",
}
