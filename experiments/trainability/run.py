"""Predict, then train, then count: `python -m experiments.trainability.run`.

Predictions of the whole grid are written before the first run starts. Stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from clearhead.signal.inspection import predict
from clearhead.signal.verdicts import THRESHOLDS, judge, verdict_of
from experiments.running import about, put_results, read_runs, run_missing
from experiments.trainability.grid import LR, STEPS, TASK, grid
from experiments.trainability.short_run import short_run

HERE = Path(__file__).parent


def predictions() -> dict[str, dict[str, Any]]:
    """What the theory says of every configuration, from the config alone."""
    answer = {}
    repetition = float((TASK.marginal_V**2).sum())
    for name, config in grid().items():
        findings = judge(predict(config, tokens=TASK.tokens, repetition=repetition))
        answer[name] = {
            "verdict": verdict_of(findings),
            "findings": {finding.kind: [finding.severity, finding.value] for finding in findings},
        }
    return answer


def said(fixed: dict[str, Any]) -> tuple[Any, ...]:
    """What was fixed before the runs: thresholds and verdicts. The values behind them may get more exact."""
    return fixed["thresholds"], {name: one["verdict"] for name, one in fixed["predictions"].items()}


def train_one(job: tuple[str, int, int]) -> dict[str, Any]:
    """Train one configuration of the grid."""
    name, seed, steps = job
    torch.set_num_threads(1)
    run = short_run(grid()[name], TASK, seed=seed, lr=LR, steps=steps)
    values = run.to_dict()
    del values["config"]
    return {"name": name, **values}


def main() -> None:
    """Run the grid and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    parser.add_argument("--quick", action="store_true", help="six configurations, 60 steps: a minute")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)

    predicted = predictions()
    fixed = {"thresholds": vars(THRESHOLDS), "predictions": predicted}
    path = asked.out / "predictions.json"
    if not path.exists():
        path.write_text(json.dumps(fixed, indent=1) + "\n")
    elif said(json.loads(path.read_text())) != said(fixed):
        raise SystemExit(f"{path} holds other verdicts; results of two versions must not mix: use another --out")

    names = list(predicted)[:: len(predicted) // 6] if asked.quick else list(predicted)
    steps = 60 if asked.quick else asked.steps
    began = time.perf_counter()
    run_missing(
        asked.out / "runs.jsonl",
        [(name, seed, steps) for seed in range(asked.seeds) for name in names],
        train_one,
        key_of_job=lambda job: job[:2],
        key_of_run=lambda run: (run["name"], run["seed"]),
        workers=asked.workers,
    )
    write(asked.out, predicted, time.perf_counter() - began, full=not asked.quick)


def write(out: Path, predicted: dict[str, dict[str, Any]], seconds: float, *, full: bool) -> None:
    """Write results.json and the table; `full` also puts it into the README."""
    runs = read_runs(out / "runs.jsonl")
    matrix = {f"{said}/{was}": 0 for said in ("trainable", "untrainable") for was in ("learned", "stuck")}
    misses = []
    for run in runs:
        said = predicted[run["name"]]["verdict"]
        was = "learned" if run["learned"] else "stuck"
        matrix[f"{said}/{was}"] += 1
        if (said == "trainable") != run["learned"]:
            misses.append({"name": run["name"], "seed": run["seed"], "said": said, "loss": run["loss"]})
    right = matrix["trainable/learned"] + matrix["untrainable/stuck"]
    results = {
        **about(),
        "seconds": round(seconds),
        "marginal_entropy": TASK.marginal_entropy,
        "conditional_entropy": TASK.conditional_entropy,
        "runs": len(runs),
        "right": right,
        "share_right": right / len(runs),
        "matrix": matrix,
        "misses": misses,
    }
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    table = [
        "| theory says | learned | stuck |",
        "|---|---|---|",
        f"| trainable | {matrix['trainable/learned']} | {matrix['trainable/stuck']} |",
        f"| untrainable | {matrix['untrainable/learned']} | {matrix['untrainable/stuck']} |",
        "",
        f"{right} of {len(runs)} right ({100 * right / len(runs):.1f} %).",
    ]
    print("\n".join(table))
    for miss in misses:
        print(f"miss: {miss['name']}: {miss['said']}, loss {miss['loss']}")
    if full:
        listed = [f"- `{m['name']}`: said {m['said']}, loss {m['loss']:.3f}" for m in misses] or ["- none"]
        put_results(HERE / "README.md", [*table, "", "Misses:", "", *listed])


if __name__ == "__main__":
    main()
