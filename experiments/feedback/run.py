"""Who tracks a state? `python -m experiments.feedback.run`.

Runs are appended as they end; stopped, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean
from typing import Any

import torch

import clearhead
from experiments.feedback.task import band_names
from experiments.feedback.train import Setup, run_one
from experiments.running import put_results, read_runs, run_missing

HERE = Path(__file__).parent
STEPS, SEEDS = 500, 3
JUDGED = "16-31"
"""The band that decides: twice the window and more."""
SETUPS = (
    *(Setup("decoder", layers) for layers in (1, 2, 4)),
    *(Setup("feedback", layers) for layers in (1, 2)),
    *(Setup("feedback", 2, memory) for memory in ("embedding", "last")),
)
QUICK = (Setup("decoder", 1), Setup("feedback", 1))


def train_one(job: tuple[Setup, int, int]) -> dict[str, Any]:
    """Train one model with one seed."""
    setup, seed, steps = job
    torch.set_num_threads(1)
    return run_one(setup, seed=seed, steps=steps)


def main() -> None:
    """Run what is missing and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=None, help="folder; results, or a passing one with --quick")
    parser.add_argument("--quick", action="store_true", help="two models, one seed, 20 steps: shows that it runs")
    asked = parser.parse_args()
    out = asked.out or (Path(tempfile.mkdtemp()) if asked.quick else HERE / "results")
    out.mkdir(parents=True, exist_ok=True)
    setups, seeds, steps = (QUICK, 1, 20) if asked.quick else (SETUPS, asked.seeds, asked.steps)
    run_missing(
        out / "runs.jsonl",
        [(setup, seed, steps) for seed in range(seeds) for setup in setups],
        train_one,
        key_of_job=lambda job: (job[0].name, job[1], job[2]),
        key_of_run=lambda run: (run["model"], run["seed"], run["steps"]),
        workers=asked.workers,
    )
    runs = [run for run in read_runs(out / "runs.jsonl") if run["steps"] == steps]
    lines = [*table(runs, setups), "", f"{steps} steps, {seeds} seeds; mean accuracy over seeds (lowest seed)."]
    print("\n".join(lines))
    if asked.quick:
        return
    verdicts = judge(runs)
    (out / "results.json").write_text(
        json.dumps(
            {
                "date": datetime.now(UTC).strftime("%Y-%m-%d"),
                "clearhead": clearhead.__version__,
                "torch": torch.__version__,
                "machine": f"{platform.machine()}, {platform.python_version()}",
                "verdicts": verdicts,
                "runs": runs,
            },
            indent=1,
        )
        + "\n"
    )
    put_results(HERE / "README.md", [*lines, "", *(f"- {text}" for text in verdicts)])


def table(runs: Sequence[dict[str, Any]], setups: Sequence[Setup]) -> list[str]:
    """Accuracy by steps since the last set; the rows are models."""
    lines = [f"| model | {' | '.join(band_names())} | seconds |", f"|---|{'---|' * len(band_names())}---|"]
    for setup in setups:
        own = [run for run in runs if run["model"] == setup.name]
        cells = [_cell([run["accuracy"][band] for run in own]) for band in band_names()]
        lines.append(f"| {setup.name} | {' | '.join(cells)} | {mean(run['seconds'] for run in own):.0f} |")
    return lines


def judge(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the falsifier struck: feedback with 1 layer below .9, or a plain decoder above .4, 16 to 31 steps on."""

    def found(name: str) -> list[float]:
        return [run["accuracy"][JUDGED] for run in runs if run["model"] == name]

    feedback = min(found(Setup("feedback", 1).name))
    plain = max(max(found(setup.name)) for setup in SETUPS if setup.architecture == "decoder")
    return [
        f"feedback with 1 layer at {JUDGED}: worst seed {feedback:.3f}, claimed at least .9: "
        f"{'holds' if feedback >= 0.9 else 'fails'}",
        f"plain decoders at {JUDGED}: best run {plain:.3f}, claimed at most .4: {'holds' if plain <= 0.4 else 'fails'}",
    ]


def _cell(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.2f} ({min(known):.2f})" if known else "-"


if __name__ == "__main__":
    main()
