"""Do verdicts keep their promises? `python -m experiments.calibration.run`.

Parts: trials (thousands of made-up comparisons) and pool (real short runs). Both are appended as they end; stopped, the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from experiments.calibration import figure, pool, report, resample, trials
from experiments.running import about, publish, read_runs, results_folder, run_missing

HERE = Path(__file__).parent
PARTS = ("trials", "pool")
TRIALS, TRIAL_PARTS, DRAWS = 2400, 2, 4000


def count(jobs: list[trials.Job], out: Path, workers: int) -> None:
    """Do the jobs that the file does not hold."""
    run_missing(
        out / "trials.jsonl",
        jobs,
        trials.run_one,
        key_of_job=trials.key_of_job,
        key_of_run=trials.key_of_run,
        workers=workers,
    )


def main() -> None:
    """Run what is missing, write results.json and the figure, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS, help="none: only write the report anew")
    parser.add_argument("--seeds", type=int, default=pool.SEEDS, help="of the pool; about 20 s of one core each")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results, or a passing one with --quick")
    parser.add_argument("--quick", action="store_true", help="the smallest of each part: shows that it runs")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)
    seeds, steps, draws = (6, 10, 40) if asked.quick else (asked.seeds, pool.STEPS, DRAWS)
    if "trials" in asked.parts:
        count(trials.jobs(40, 1) if asked.quick else trials.jobs(TRIALS, TRIAL_PARTS), out, asked.workers)
        stand_out = trials.again(report.pooled(read_runs(out / "trials.jsonl")), 40 if asked.quick else TRIALS)
        if stand_out:
            count(stand_out, out, asked.workers)
    if "pool" in asked.parts:
        run_missing(
            out / "pool.jsonl",
            pool.jobs(seeds, steps),
            pool.train_one,
            key_of_job=pool.key_of_job,
            key_of_run=pool.key_of_run,
            workers=asked.workers,
        )
    counted = read_runs(out / "trials.jsonl")
    rows, fresh = report.pooled(counted), report.pooled(counted, fresh=True)
    studied = resample.study(read_runs(out / "pool.jsonl"), steps, draws)
    said = report.verdicts(rows, studied, fresh)
    found = {"about": about(), "verdicts": said, "trials": rows, "fresh": fresh, "pool": studied}
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = ["![rates by number of seeds](results/calibration.svg)", "", *(f"- {line}" for line in said), ""]
    publish(
        HERE, out, [*lines, *report.tables(rows, studied)], lambda: {"calibration.svg": figure.draw_all(rows, studied)}
    )


if __name__ == "__main__":
    main()
