"""Positions beyond the training length: `python -m experiments.positions.run`. Stopped, the same command goes on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from experiments.positions import lengths, report
from experiments.running import publish, read_runs, results_folder, run_missing, run_parts

HERE = Path(__file__).parent
QUICK: dict[str, Any] = {"steps": 12, "lengths": (128, 256), "tokens": lengths.QUICK_TOKENS}


def rates_part(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """Each arm at each learning rate, on a seed of its own, without the test text."""
    if quick:  # the plan is as long as the full one; what it costs is not
        jobs = [lengths.Job(arm, lengths.RATES[0], lengths.TUNING_SEED, QUICK["steps"], ()) for arm in lengths.ARMS]
    else:
        jobs = [
            lengths.Job(arm, rate, lengths.TUNING_SEED, lengths=()) for arm in lengths.ARMS for rate in lengths.RATES
        ]
    return report.rates(_run(out / "rates.jsonl", jobs, workers))


def scores_part(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """Each arm at its best rate, scored by context; then, at one rate, what verdicts between others wait for."""
    best = lengths.best_rates(read_runs(out / "rates.jsonl"))
    more: dict[str, Any] = QUICK if quick else {}
    jobs = [lengths.Job(arm, best[arm], seed, **more) for seed in range(seeds) for arm in lengths.ARMS if arm in best]
    runs = _run(out / "runs.jsonl", jobs, workers)
    pairs = report.wanted(runs)
    more_jobs = [lengths.Job(arm, rate, seed, **more) for arm, rate in pairs for seed in range(seeds)]
    return report.scores(runs, _run(out / "runs.jsonl", more_jobs, workers) if more_jobs else [])


def _run(path: Path, jobs: list[lengths.Job], workers: int) -> list[dict[str, Any]]:
    """The runs of these jobs, the missing ones made now."""
    run_missing(
        path, jobs, lengths.train, key_of_job=lambda job: job.key, key_of_run=lengths.key_of_run, workers=workers
    )
    wanted = {job.key for job in jobs}
    return [run for run in read_runs(path) if lengths.key_of_run(run) in wanted]


PARTS = {"rates": rates_part, "scores": scores_part}


def main() -> None:
    """Run the parts, write results.json and the figure, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3, help="of the scored runs")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results/ here, or a passing one with --quick")
    parser.add_argument("--quick", action="store_true", help="a few steps of each arm; README and figure stay")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)
    results = run_parts(
        out,
        asked.parts,
        PARTS,
        indent=1,
        seeds=1 if asked.quick else asked.seeds,
        workers=asked.workers,
        quick=asked.quick,
    )
    lines = report.page(results)
    publish(HERE, out, lines, lambda: {"lengths.svg": report.figure(results["scores"])} if "scores" in results else {})


if __name__ == "__main__":
    main()
