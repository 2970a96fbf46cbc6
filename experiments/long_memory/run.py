"""Where a long memory belongs: `python -m experiments.long_memory.run`. Stopped, the same command goes on."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from experiments.long_memory import recall, report, text
from experiments.running import about, put_results, read_runs, run_missing

HERE = Path(__file__).parent
QUICK_STEPS = 60


def recall_part(out: Path, *, seeds: int, layers: list[int], workers: int, quick: bool) -> dict[str, Any]:
    """Parts (a) and (b): two-step recall by layout and range."""
    jobs = [
        recall.Job(depth, layout, span, seed, QUICK_STEPS if quick else recall.STEPS)
        for seed in range(seeds)
        for depth in layers
        for span in (("window",) if quick or depth > 2 else ("window", "memory"))
        for layout in (("last:1",) if quick else recall.LAYOUTS[depth])
    ]
    path = out / "recall.jsonl"
    run_missing(
        path, jobs, recall.train, key_of_job=lambda job: job.key, key_of_run=recall.key_of_run, workers=workers
    )
    return report.recall(read_runs(path))


def text_part(out: Path, *, seeds: int, layers: list[int], workers: int, quick: bool) -> dict[str, Any]:
    """Part (c): bits per byte."""
    jobs = [
        text.Job(arm, seed, QUICK_STEPS if quick else text.STEPS)
        for seed in range(seeds)
        for arm in (("last:1",) if quick else text.ARMS)
    ]
    path = out / "text.jsonl"
    run_missing(path, jobs, text.train, key_of_job=lambda job: job.key, key_of_run=text.key_of_run, workers=workers)
    return report.text(read_runs(path))


PARTS = {"recall": recall_part, "text": text_part}


def main() -> None:
    """Run the parts, write results.json and the figure, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, nargs="*", choices=list(recall.LAYOUTS), default=list(recall.LAYOUTS))
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="default results/ here; with --quick a folder is needed")
    parser.add_argument("--quick", action="store_true", help="one short run a part; README and figure stay")
    asked = parser.parse_args()
    if asked.quick and asked.out is None:
        parser.error("--quick needs --out FOLDER, so that it does not mix with the committed results")
    out = asked.out or HERE / "results"
    out.mkdir(parents=True, exist_ok=True)
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["about"] = about()
    for part in asked.parts:
        began = time.perf_counter()
        found = PARTS[part](
            out,
            seeds=1 if asked.quick else asked.seeds,
            layers=asked.layers[:1] if asked.quick else asked.layers,
            workers=asked.workers,
            quick=asked.quick,
        )
        results[part] = {**found, "seconds_of_this_call": round(time.perf_counter() - began)}
        print("\n".join(report.TABLES[part](found)), end="\n\n")
    path.write_text(json.dumps(results, indent=1) + "\n")
    if asked.quick or out != HERE / "results":
        return
    put_results(HERE / "README.md", report.page(results))
    (out / "recall.svg").write_text(report.figure(results["recall"]))


if __name__ == "__main__":
    main()
