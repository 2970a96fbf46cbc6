"""Performer: `python -m experiments.performer.run`. Stopped, the same command goes on; `--quick` for half a minute."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.performer import conversion, error, report
from experiments.running import publish, read_runs, results_folder, run_missing, run_parts

HERE = Path(__file__).parent
JOB = conversion.Job(seed=0, steps=600, further=60, every=5)
LONGER = conversion.Job(
    seed=1, steps=600, further=300, every=25, arms=("performer, redrawn",), features=(64, 256, 1024, 4096)
)
"""One arm of one seed, to see whether it comes back at all, and what more features would have kept."""
QUICK = conversion.Job(seed=0, steps=10, further=4, every=2)


def errors(out: Path, *, seeds: int, workers: int, quick: bool) -> Any:
    """Error against features, orthogonal against independent rows, signs."""
    return error.measure(quick=quick)


def conversions(out: Path, *, seeds: int, workers: int, quick: bool) -> Any:
    """A softmax model under performer attention."""
    job = QUICK if quick else JOB
    run_missing(
        out / "conversion.jsonl",
        [*(replace(job, seed=seed) for seed in range(seeds)), *([] if quick else [LONGER])],
        conversion.train_one,
        key_of_job=lambda one: (one.seed, one.steps, one.further),
        key_of_run=lambda run: (run["seed"], run["steps"], run["further"]),
        workers=workers,
    )
    return sorted(read_runs(out / "conversion.jsonl"), key=lambda run: run["seed"])


PARTS = {"error": errors, "conversion": conversions}


def main() -> None:
    """Run the parts, write results.json and the figures, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3, help="of the conversion")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results/ here, or a passing one with --quick")
    parser.add_argument("--quick", action="store_true", help="few draws, few steps; README and figures stay")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)
    results = run_parts(
        out, asked.parts, PARTS, seeds=1 if asked.quick else asked.seeds, workers=asked.workers, quick=asked.quick
    )
    lines = report.page(results)
    publish(HERE, out, lines, lambda: report.figures(results))


if __name__ == "__main__":
    main()
