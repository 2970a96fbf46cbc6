"""Adopting another attention: `python -m experiments.adopt_pretrained.run`. Stopped, the same command goes on."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.adopt_pretrained import measure, report
from experiments.adopt_pretrained.measure import Job
from experiments.running import about, publish, read_runs, results_folder, run_missing

HERE = Path(__file__).parent
ZERO_SHOT = (
    "softmax",
    "softmax+selective",
    "laser",
    "self_adjust",
    "self_adjust:form=minmax",
    "softmax+window:128",
    "softmax+window:32",
    "softmax+bigbird:block_size=16",
    "performer:features=256",
)
RECOVERY = ("softmax", "laser", "self_adjust")


def zero_shot(job: Job, *, out: Path, seeds: int, workers: int) -> Any:
    """The pretrained weights under each attention, nothing trained."""
    jobs = [replace(job, attention=attention, steps=0) for attention in ZERO_SHOT]
    path = out / "zero_shot.jsonl"
    run_missing(
        path,
        jobs,
        measure.zero_shot,
        key_of_job=lambda one: one.attention,
        key_of_run=lambda run: run["attention"],
        workers=workers,
    )
    return sorted(read_runs(path), key=lambda run: ZERO_SHOT.index(run["attention"]))


def recovery(job: Job, *, out: Path, seeds: int, workers: int) -> Any:
    """LoRA under LASER and Self-Adjust, and under softmax for comparison: the same batches for the three."""
    jobs = [replace(job, attention=attention, seed=seed) for seed in range(seeds) for attention in RECOVERY]
    path = out / "recovery.jsonl"
    run_missing(
        path,
        jobs,
        measure.recover,
        key_of_job=lambda one: (one.attention, one.seed),
        key_of_run=lambda run: (run["attention"], run["seed"]),
        workers=workers,
    )
    return read_runs(path)


PARTS = {"zero_shot": zero_shot, "recovery": recovery}


def main() -> None:
    """Run the parts, write results.json and the figure, and put the tables into the README."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--model", default="smollm2", help="a name, or a Hugging Face folder")
    parser.add_argument("--data", default="shakespeare")
    parser.add_argument("--seeds", type=int, default=3, help="of the training")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=2048, help="of the test text that are scored")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of training; scores are fp32")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder; results/ here, or a passing one with --quick")
    parser.add_argument("--quick", action="store_true", help="two steps, one window; README and figures stay")
    asked = parser.parse_args()
    out = results_folder(HERE, asked.out, quick=asked.quick)

    # The runs themselves (checkpoints, metrics) are large and lie elsewhere unless an --out was named.
    runs = out if asked.out or asked.quick else Path("runs") / "adopt_pretrained"
    job = Job(
        model=asked.model,
        data=asked.data,
        attention="softmax",
        steps=2 if asked.quick else asked.steps,
        context=32 if asked.quick else asked.context,
        batch=asked.batch,
        tokens=64 if asked.quick else asked.tokens,
        eval_every=1 if asked.quick else max(1, asked.steps // 5),
        precision=asked.precision,
        out=str(runs),
    )
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results["about"] = about()
    for part in asked.parts:
        results[part] = PARTS[part](job, out=out, seeds=1 if asked.quick else asked.seeds, workers=asked.workers)
        path.write_text(json.dumps(results) + "\n")
    publish(HERE, out, report.page(results), lambda: report.figures(results))


if __name__ == "__main__":
    main()
