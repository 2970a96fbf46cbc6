"""BigBird: `python -m experiments.bigbird.run`. Stopped, the same command goes on; `--quick` for seconds."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from experiments.bigbird import dna, furthest, graph, needle, report, words
from experiments.running import about, publish, read_runs, results_folder, run_missing

HERE = Path(__file__).parent
STEPS = 3000
DNA_STEPS, DNA_SEEDS = 600, 3
WORD_STEPS = 600
FURTHEST_STEPS = 1000
BY_THE_GRAPH = 500
"""Steps of a pattern whose needle cannot reach the reader: enough to see that nothing is learned."""


def needles(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """The needle by pattern, the best that the graph allows, and the graph's diameters."""
    jobs = []
    for seed in range(seeds):
        for pattern in needle.PATTERNS:
            steps = BY_THE_GRAPH if pattern == "window" else STEPS
            jobs.append(needle.Job(pattern, seed, 20 if quick else steps))
    run_missing(
        out / "needle.jsonl",
        jobs,
        needle.train_one,
        key_of_job=lambda job: (job.pattern, job.seed, job.steps),
        key_of_run=lambda run: (run["pattern"], run["seed"], run["budget"]),
        workers=workers,
    )
    blocks, drawn = ((16, 64), range(2)) if quick else ((16, 64, 256, 1024), range(5))
    return {
        "runs": read_runs(out / "needle.jsonl"),
        "ceilings": {p: [graph.ceiling(needle.Job(p, s, 0)) for s in range(seeds)] for p in needle.PATTERNS},
        "diameters": graph.diameters(blocks, drawn),
    }


def bases(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """Masked DNA by context."""
    contexts = dna.CONTEXTS[:1] if quick else dna.CONTEXTS
    run_missing(
        out / "dna.jsonl",
        [
            dna.Job(context, seed, 4 if quick else DNA_STEPS)
            for seed in range(1 if quick else DNA_SEEDS)
            for context in contexts
        ],
        dna.train_one,
        key_of_job=lambda job: (job.context, job.seed, job.steps),
        key_of_run=lambda run: (run["context"], run["seed"], run["steps"]),
        workers=workers,
    )
    return {"runs": read_runs(out / "dna.jsonl")}


def words_hidden(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """The paper's ablation as a masked LM on text."""
    run_missing(
        out / "words.jsonl",
        [words.Job(pattern, seed, 4 if quick else WORD_STEPS) for seed in range(seeds) for pattern in words.PATTERNS],
        words.train_one,
        key_of_job=lambda job: (job.pattern, job.seed, job.steps),
        key_of_run=lambda run: (run["pattern"], run["seed"], run["steps"]),
        workers=workers,
    )
    return {"runs": read_runs(out / "words.jsonl")}


def furthest_points(out: Path, *, seeds: int, workers: int, quick: bool) -> dict[str, Any]:
    """The furthest point by pattern and depth."""
    run_missing(
        out / "furthest.jsonl",
        [
            furthest.Job(pattern, layers, seed, 20 if quick else FURTHEST_STEPS)
            for seed in range(seeds)
            for pattern, depths in furthest.LAYERS.items()
            for layers in depths
        ],
        furthest.train_one,
        key_of_job=lambda job: (job.pattern, job.layers, job.seed, job.steps),
        key_of_run=lambda run: (run["pattern"], run["layers"], run["seed"], run["steps"]),
        workers=workers,
    )
    return {"runs": read_runs(out / "furthest.jsonl")}


PARTS = {"needle": needles, "furthest": furthest_points, "words": words_hidden, "dna": bases}


def main() -> None:
    """Run the parts, write results.json and the figure, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), default=None, help="default all; with --quick the needle"
    )
    parser.add_argument("--seeds", type=int, default=2, help="of needle, furthest and words")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results/ here, or a passing one with --quick")
    parser.add_argument("--quick", action="store_true", help="a few steps of one seed; README and figure stay")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)

    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["about"] = about()
    for part in asked.parts or (["needle"] if asked.quick else list(PARTS)):
        began = time.perf_counter()
        seeds = 1 if asked.quick else asked.seeds
        results[part] = PARTS[part](out, seeds=seeds, workers=asked.workers, quick=asked.quick)
        results[part]["seconds_of_this_call"] = round(time.perf_counter() - began)
    path.write_text(json.dumps(results) + "\n")
    lines = report.page(results)
    publish(HERE, out, lines, lambda: report.figures(results))


if __name__ == "__main__":
    main()
