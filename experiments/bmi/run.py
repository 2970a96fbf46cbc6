"""BMI: `python -m experiments.bmi.run`. Stopped, the same command goes on; `--quick --out FOLDER` for half a minute."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from experiments.bmi import report, runs
from experiments.bmi.topics import best_nats, information
from experiments.running import about, publish, read_runs, run_missing

HERE = Path(__file__).parent
ARMS_OF = {
    "topics": list(runs.ARMS),
    "shuffled": [runs.PLAIN, "BMI-base 0.1"],
    "shakespeare": [runs.PLAIN, "BMI-base 0.1", runs.LONGER],
}
SEEDS = {"topics": 5, "shuffled": 5, "shakespeare": 3}


def main() -> None:
    """Train, write results.json and the figure, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpora", nargs="*", choices=list(ARMS_OF), default=list(ARMS_OF))
    parser.add_argument("--seeds", type=int, default=None, help="default 5 for made corpora, 3 for real text")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="default results/ here; with --quick a folder is needed")
    parser.add_argument("--quick", action="store_true", help="small and few: half a minute; README and figure stay")
    asked = parser.parse_args()
    if asked.quick and asked.out is None:
        parser.error("--quick needs --out FOLDER, so that it does not mix with the committed results")
    out = asked.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)

    began = time.perf_counter()
    corpora = ["topics", "shuffled"] if asked.quick else asked.corpora
    settings = {
        name: dataclasses.replace(runs.QUICK, source=name) if asked.quick else runs.SETTINGS[name] for name in corpora
    }
    run_missing(
        out / "runs.jsonl",
        [
            runs.Job(arm, seed, settings[name])
            for name in corpora
            for seed in range(1 if asked.quick else asked.seeds or SEEDS[name])
            for arm in ARMS_OF[name]
        ],
        runs.train_one,
        key_of_job=lambda job: job.key,
        key_of_run=lambda run: (run["corpus"], run["arm"], run["seed"]),
        workers=asked.workers,
    )
    done = read_runs(out / "runs.jsonl")
    found = report.results(done)
    corpus = settings.get("topics", runs.SETTINGS["topics"]).corpus
    draws = 50 if asked.quick else 2000
    seeds = sorted({run["seed"] for run in done if run["corpus"] == "topics"})
    found["known"] = {
        "best_nats": report.mean([best_nats(corpus, s, shuffled=False, tokens=4, draws=draws) for s in seeds]),
        "best_nats_shuffled": report.mean([best_nats(corpus, s, shuffled=True, tokens=4, draws=draws) for s in seeds]),
        "information": report.mean([information(corpus, s, draws=draws) for s in seeds]),
    }
    made = {**about(), "seconds_of_this_call": round(time.perf_counter() - began)}
    (out / "results.json").write_text(json.dumps({"about": made, **found}, indent=1) + "\n")
    lines = report.page(found)
    publish(HERE, out, lines, lambda: {"topics.svg": report.figure(found)})


if __name__ == "__main__":
    main()
