"""Admin: `python -m experiments.admin.run`. Stopped, the same command goes on; `--quick` for a minute."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from experiments.admin import amplification as grow
from experiments.admin import report
from experiments.admin import translation as talk
from experiments.running import about, put_results, read_runs, run_missing

HERE = Path(__file__).parent
TUNING_SEED = 0


def amplification(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """Part (a): the change of the output under a small change of all weights."""
    sublayers = grow.QUICK_SUBLAYERS if quick else grow.SUBLAYERS
    run_missing(
        out / "amplification.jsonl",
        [grow.Job(scheme, depth, seed) for depth in sublayers for scheme in grow.SCHEMES for seed in range(seeds)],
        grow.measure_one,
        key_of_job=lambda job: (job.scheme, job.sublayers, job.seed),
        key_of_run=lambda run: (run["scheme"], run["sublayers"], run["seed"]),
        workers=workers,
    )
    return report.amplification(read_runs(out / "amplification.jsonl"))


def translation(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """Part (b): learning rates on one seed by the validation pairs, then all seeds at the chosen ones.

    Last, at one rate, what a verdict between arms of different rates waits for.
    """
    setting = talk.QUICK if quick else talk.SETTING
    path = out / "translation.jsonl"

    def run(jobs: list[talk.Job]) -> None:
        run_missing(
            path,
            jobs,
            talk.train_one,
            key_of_job=lambda job: (job.arm, job.lr, job.seed),
            key_of_run=lambda one: (one["arm"], one["lr"], one["seed"]),
            workers=workers,
        )

    rates = talk.RATES[1:2] if quick else talk.RATES
    run([talk.Job(arm, lr, TUNING_SEED, setting) for lr in rates for arm in talk.ARMS])
    chosen = talk.chosen_rates([one for one in read_runs(path) if one["seed"] == TUNING_SEED])
    run([talk.Job(arm, chosen[arm], seed, setting) for seed in range(seeds) for arm in talk.ARMS])
    pairs = report.wanted(read_runs(path), chosen)
    run([talk.Job(arm, lr, seed, setting) for arm, lr in pairs for seed in range(seeds)])
    return report.translation(
        read_runs(path),
        chosen,
        plateaus={split: talk.frequency_loss(setting, split) for split in ("val", "test")},
        expected=talk.expectations(setting),
        setting=vars(setting),
    )


PARTS = {"amplification": amplification, "translation": translation}


def main() -> None:
    """Run the parts, write results.json and the figures, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=None, help="default 5 for amplification, 3 for translation")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="default results/ here; with --quick a folder is needed")
    parser.add_argument("--quick", action="store_true", help="small and few: a minute; README and figures stay")
    asked = parser.parse_args()
    if asked.quick and asked.out is None:
        parser.error("--quick needs --out FOLDER, so that it does not mix with the committed results")
    out = asked.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)

    results: dict[str, Any] = {}
    path = out / "results.json"
    if path.exists():
        results = json.loads(path.read_text())
    results["about"] = about()
    for part in asked.parts:
        began = time.perf_counter()
        seeds = asked.seeds or {"amplification": 5, "translation": 3}[part]
        found = PARTS[part](out, seeds=1 if asked.quick else seeds, workers=asked.workers, quick=asked.quick)
        results[part] = {**found, "seconds_of_this_call": round(time.perf_counter() - began)}
        print("\n".join(report.TABLES[part](found)), end="\n\n")
    path.write_text(json.dumps(results, indent=1) + "\n")
    if asked.quick or out != HERE / "results":
        return
    put_results(HERE / "README.md", report.page(results))
    for name, svg in report.figures(results).items():
        (out / name).write_text(svg)


if __name__ == "__main__":
    main()
