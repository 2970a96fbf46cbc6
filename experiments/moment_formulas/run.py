"""Every formula of the moment theory against simulation, and the page that shows it.

python -m experiments.moment_formulas.run                  # everything: results.json and docs/moment-formulas.md
python -m experiments.moment_formulas.run --case relu      # one formula; the others keep their results
python -m experiments.moment_formulas.run --quick          # under a minute; prints, writes nothing
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from clearhead.errors import UserError, unknown
from experiments.moment_formulas import attention, feed_forward, maps, pointwise
from experiments.moment_formulas.case import Case, Comparison, compare, sample_points
from experiments.moment_formulas.page import Fit, fits, write_page

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"
PAGE = HERE.parent.parent / "docs" / "moment-formulas.md"

REPLICAS = 2
"""Independent simulations per point: their mean is compared, their spread is what the simulation adds to the error."""
QUICK_POINTS = 3
QUICK_SLACK = 2.0
"""A few points have no percentiles: --quick fails a case whose median error is more than this many times the target."""


def all_cases() -> tuple[Case, ...]:
    """The cases of every formula, in the order of the page."""
    return (*maps.CASES, *pointwise.CASES, *feed_forward.CASES, *attention.CASES)


def run_case(case: Case, points: int, seed: int, progress: Progress) -> list[Comparison]:
    """Compare at `points` grid points."""
    task = progress.add_task(case.name, total=points)
    rows: list[Comparison] = []
    chosen = sample_points(case, points, seed)
    progress.update(task, total=len(chosen))
    for index, params in enumerate(chosen):
        # A generator per point and replica: a point gives the same numbers however many stand before it.
        seeds = [1_000_003 * seed + REPLICAS * index + replica for replica in range(REPLICAS)]
        rows.extend(compare(case, params, [torch.Generator().manual_seed(value) for value in seeds]))
        progress.advance(task)
    return rows


def _short(value: float, digits: int = 6) -> float:
    return float(f"{value:.{digits}g}")


def as_json(case: Case, rows: Sequence[Comparison], seconds: float, seed: int) -> dict[str, Any]:
    """Columns by quantity; points in the order of the rows."""
    by_quantity = {quantity: [row for row in rows if row.quantity == quantity] for quantity in case.quantities}
    names = list(case.grid)
    return {
        "seed": seed,
        "seconds": round(seconds),
        "torch": torch.__version__,
        "params": names,
        "points": [[_short(row.params[name], 4) for name in names] for row in by_quantity[case.quantities[0]]],
        "quantities": {
            quantity: {
                "predicted": [_short(row.predicted) for row in found],
                "simulated": [_short(row.simulated) for row in found],
                "error": [_short(row.error, 3) for row in found],
                "noise": [_short(row.noise, 3) for row in found],
            }
            for quantity, found in by_quantity.items()
        },
    }


def print_table(console: Console, cases: Sequence[Case], results: dict[str, Any]) -> list[Fit]:
    """Print the percentiles; return them."""
    table = Table("formula", "quantity", "p50 %", "p90 %", "p99 %", "noise %")
    found = fits(cases, results)
    for fit in found:
        numbers = [f"{100 * value:.2f}" for value in (fit.p50, fit.p90, fit.p99, fit.noise)]
        table.add_row(fit.case, fit.quantity, *numbers, style="" if fit.met or not fit.judged else "red")
    console.print(table)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", help="a formula by name; may be repeated; default: all")
    parser.add_argument("--points", type=int, help="grid points per formula; default: what the case asks for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_POINTS} points each, nothing written")
    parser.add_argument("--page-only", action="store_true", help="write the page from results.json again")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    known = {case.name: case for case in all_cases()}
    try:
        chosen = [known[name] if name in known else _refuse(name, known) for name in options.case or known]
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2

    console = Console()
    results = {} if options.quick else _saved(known)
    columns = (TextColumn("{task.description:>24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        for case in () if options.page_only else chosen:
            start = time.perf_counter()
            points = options.points or (QUICK_POINTS if options.quick else case.points)
            rows = run_case(case, points, options.seed, progress)
            results[case.name] = as_json(case, rows, time.perf_counter() - start, options.seed)
            if not options.quick:
                # Another run may have added its own meanwhile.
                results = _saved(known) | {case.name: results[case.name]}
                _save(results, list(known))
    found = print_table(console, [case for case in chosen if case.name in results], results)
    if options.quick:
        off = [fit for fit in found if fit.judged and fit.p50 > QUICK_SLACK * fit.targets[0]]
        for fit in off:
            console.print(f"[red]{fit.case} {fit.quantity}: median error {100 * fit.p50:.1f} %[/red]")
        return 1 if off else 0
    write_page(PAGE, [case for case in known.values() if case.name in results], results)
    console.print(f"wrote {RESULTS.name} and {PAGE.name}")
    return 0


def _refuse(name: str, known: dict[str, Case]) -> Case:
    raise unknown("formula", name, known)


def _saved(known: Collection[str]) -> dict[str, Any]:
    """The results on disk, but for formulas that no longer exist."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return {name: value for name, value in results.items() if name in known}


def _save(results: dict[str, Any], order: list[str]) -> None:
    ordered = {name: results[name] for name in order if name in results}
    parts = [f"{json.dumps(name)}: {json.dumps(value, separators=(',', ':'))}" for name, value in ordered.items()]
    RESULTS.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    sys.exit(main())
