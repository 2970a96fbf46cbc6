"""100 layers on the successor task: `python -m experiments.deep_training.run`. Stopped, the same command goes on."""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from scipy import stats

import clearhead
from clearhead.init.admin import needs_profile, profile_omega
from experiments.running import put_results, read_runs, run_missing
from experiments.trainability.grid import TASK, config
from experiments.trainability.short_run import short_run

HERE = Path(__file__).parent
LAYERS, WIDTH = 100, 64


@dataclass(frozen=True)
class Arm:
    """One line of the table."""

    placement: str
    init: str
    lr: float = 3e-4
    warmup_steps: int = 0
    steps: int = 150

    @property
    def name(self) -> str:
        """Its key in the results."""
        words = [self.init, self.placement, f"lr {self.lr:g}", f"{self.steps} steps"]
        return ", ".join(words + ([f"warm-up {self.warmup_steps}"] if self.warmup_steps else []))


ARMS = (
    Arm("post", "xavier"),
    Arm("post", "deepscale"),
    Arm("post", "deepscale_simple"),
    Arm("pre", "xavier"),
    Arm("pre", "deepscale"),
    Arm("post", "xavier", steps=400),
    Arm("post", "admin", steps=400),
    Arm("post", "deepscale", lr=1e-3),
    Arm("post", "deepscale", lr=1e-3, warmup_steps=100),
)


def train_one(job: tuple[int, int, int]) -> dict[str, Any]:
    """Train one arm with one seed."""
    index, seed, layers = job
    torch.set_num_threads(1)
    arm = ARMS[index]

    def prepare(model: torch.nn.Module, tokens_bt: torch.Tensor) -> None:
        if needs_profile(model):
            profile_omega(model, tokens_bt, seed=seed)

    run = short_run(
        config(layers, WIDTH, 0.0, arm.placement, arm.init),
        TASK,
        seed=seed,
        lr=arm.lr,
        warmup_steps=arm.warmup_steps,
        steps=arm.steps,
        prepare=prepare,
    )
    values = run.to_dict()
    del values["config"]
    return {"arm": arm.name, "layers": layers, **values}


def main() -> None:
    """Run every arm and seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--arms", nargs="*", type=int, default=list(range(len(ARMS))), help="indices")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    run_missing(
        asked.out / "runs.jsonl",
        [(index, seed, asked.layers) for seed in range(asked.seeds) for index in asked.arms],
        train_one,
        key_of_job=lambda job: (ARMS[job[0]].name, *job[1:]),
        key_of_run=lambda run: (run["arm"], run["seed"], run["layers"]),
        workers=asked.workers,
    )
    write(asked.out, time.perf_counter() - began)


def write(out: Path, seconds: float) -> None:
    """Write results.json and put the table into the README."""
    runs = read_runs(out / "runs.jsonl")
    rows = []
    for name in dict.fromkeys(arm.name for arm in ARMS):
        losses = [float(run["loss"]) for run in runs if run["arm"] == name]
        if not losses:
            continue
        mean = sum(losses) / len(losses)
        half = math.nan
        if len(losses) > 1 and all(map(math.isfinite, losses)):
            half = stats.t.ppf(0.975, len(losses) - 1) * stats.tstd(losses) / math.sqrt(len(losses))
        learned = sum(run["learned"] for run in runs if run["arm"] == name)
        rows.append({"arm": name, "seeds": len(losses), "mean": mean, "half": half, "learned": learned})
    about = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "clearhead": clearhead.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seconds": round(seconds),
        "marginal_entropy": TASK.marginal_entropy,
        "conditional_entropy": TASK.conditional_entropy,
        "rows": [{**row, "half": None if math.isnan(row["half"]) else row["half"]} for row in rows],
    }
    (out / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    table = ["| arm | loss, mean of the last 20 steps (95 % interval) | seeds that learned |", "|---|---|---|"]
    table += [
        f"| {row['arm']} | {row['mean']:.3f}"
        + ("" if math.isnan(row["half"]) else f" ± {row['half']:.3f}")
        + f" | {row['learned']} of {row['seeds']} |"
        for row in rows
    ]
    print("\n".join(table))
    put_results(HERE / "README.md", table)


if __name__ == "__main__":
    main()
