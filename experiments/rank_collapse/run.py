"""Rank collapse and score growth: `python -m experiments.rank_collapse.run`. Stopped, the same command goes on."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from experiments.rank_collapse import figures, initial, report, training
from experiments.running import about, publish, read_runs, run_missing

HERE = Path(__file__).parent


def main() -> None:
    """Measure, train, write results.json and the figures, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="at initialisation")
    parser.add_argument("--training-seeds", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="default results/ here; with --quick a folder is needed")
    parser.add_argument("--quick", action="store_true", help="small and few: a minute; README and figures stay")
    asked = parser.parse_args()
    if asked.quick and asked.out is None:
        parser.error("--quick needs --out FOLDER, so that it does not mix with the committed results")
    out = asked.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    small = {"layers": 4, "steps": 20, "every": 10} if asked.quick else {}
    run_missing(
        out / "initial.jsonl",
        initial.jobs(1, depths=(4,), deepest=8) if asked.quick else initial.jobs(asked.seeds),
        initial.measure_one,
        key_of_job=lambda job: job.key,
        key_of_run=lambda run: tuple(
            run[name] for name in ("kind", "arm", "layers", "dropout", "seed", "strength", "k")
        ),
        workers=asked.workers,
    )
    run_missing(
        out / "training.jsonl",
        [
            training.Job(arm, lr, seed, **small)
            for seed in range(1 if asked.quick else asked.training_seeds)
            for lr in (training.RATES[:1] if asked.quick else training.RATES)
            for arm in training.ARMS
        ],
        training.train_one,
        key_of_job=lambda job: (job.arm, job.lr, job.seed),
        key_of_run=lambda run: (run["arm"], run["lr"], run["seed"]),
        workers=asked.workers,
    )
    found = report.results(read_runs(out / "initial.jsonl"), read_runs(out / "training.jsonl"), training.entropies())
    made = {**about(), "seconds_of_this_call": round(time.perf_counter() - began)}
    (out / "results.json").write_text(json.dumps({"about": made, **found}) + "\n")
    lines = report.page(found)
    publish(HERE, out, lines, lambda: figures.figures(found))


if __name__ == "__main__":
    main()
