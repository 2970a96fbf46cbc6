"""100, 192 and 1,000 layers on the successor task: `python -m experiments.deep_training.run`.

Stopped, the same command goes on. At 192 layers every arm tries the same learning rates with the first seed, and its
best one with the other seeds.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from clearhead.init.admin import needs_profile, profile_omega
from experiments.running import about, mean_half, put_results, read_runs, run_missing
from experiments.trainability.grid import TASK, config
from experiments.trainability.short_run import short_run

HERE = Path(__file__).parent
WIDTH = 64
RATES = (1e-4, 3e-4, 1e-3)


@dataclass(frozen=True)
class Arm:
    """One line of a table."""

    placement: str
    init: str
    lr: float = 3e-4
    warmup_steps: int = 0
    steps: int = 150
    layers: int = 100

    @property
    def name(self) -> str:
        """Its key in the results, with the number of layers."""
        words = [self.init, self.placement, f"lr {self.lr:g}", f"{self.steps} steps"]
        return ", ".join(words + ([f"warm-up {self.warmup_steps}"] if self.warmup_steps else []))


HUNDRED = (
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
GRID = (
    Arm("post", "xavier", layers=192),
    Arm("post", "deepscale", layers=192),
    Arm("pre", "xavier", layers=192),
    Arm("pre", "deepscale", layers=192),
    Arm("post", "admin", layers=192, steps=400),
)
"""Each at every one of RATES."""
THOUSAND = (Arm("post", "deepscale", layers=1000, lr=1e-4),)
QUICK = (Arm("post", "xavier", layers=24, steps=60), Arm("post", "deepscale", layers=24, steps=60, lr=1e-3))


def train_one(job: tuple[Arm, int]) -> dict[str, Any]:
    """Train one arm with one seed."""
    arm, seed = job
    torch.set_num_threads(1)

    def prepare(model: torch.nn.Module, tokens_bt: torch.Tensor) -> None:
        if needs_profile(model):
            profile_omega(model, tokens_bt, seed=seed)

    run = short_run(
        config(arm.layers, WIDTH, 0.0, arm.placement, arm.init),
        TASK,
        seed=seed,
        lr=arm.lr,
        warmup_steps=arm.warmup_steps,
        steps=arm.steps,
        prepare=prepare,
    )
    values = run.to_dict()
    del values["config"]
    return {"arm": arm.name, "layers": arm.layers, **values}


def main() -> None:
    """Run what is missing and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="of each arm; 1,000 layers have one")
    parser.add_argument("--layers", type=int, nargs="*", default=[100, 192, 1000], help="depths to run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="24 layers, 60 steps, one seed; leaves the README alone")
    parser.add_argument("--out", type=Path, help="default: results here, or ./results-quick")
    asked = parser.parse_args()
    out = asked.out or (Path("results-quick") if asked.quick else HERE / "results")
    out.mkdir(parents=True, exist_ok=True)

    def run(arms: Iterable[Arm], seeds: Iterable[int]) -> None:
        run_missing(
            out / "runs.jsonl",
            list(product(arms, seeds)),
            train_one,
            key_of_job=lambda job: (job[0].name, job[0].layers, job[1]),
            key_of_run=lambda run: (run["arm"], run["layers"], run["seed"]),
            workers=asked.workers,
        )

    if asked.quick:
        run(QUICK, [0])
    if 100 in asked.layers and not asked.quick:
        run(HUNDRED, range(asked.seeds))
    if 192 in asked.layers and not asked.quick:
        rates = [replace(arm, lr=lr) for arm in GRID for lr in RATES]
        run(rates, [0])
        run(best_of(rates, read_runs(out / "runs.jsonl")), range(1, asked.seeds))
    if 1000 in asked.layers and not asked.quick:
        run(THOUSAND, [0])
    write(out, readme=None if asked.quick else HERE / "README.md")


def best_of(arms: Sequence[Arm], runs: Sequence[dict[str, Any]]) -> list[Arm]:
    """Of the arms that differ in their learning rate only, the one whose first seed ended lowest."""
    loss = {(run["arm"], run["layers"]): float(run["loss"]) for run in runs if run["seed"] == 0}
    best: dict[Arm, Arm] = {}
    for arm in arms:
        kind = replace(arm, lr=0.0)
        if kind not in best or loss[arm.name, arm.layers] < loss[best[kind].name, arm.layers]:
            best[kind] = arm
    return list(best.values())


def table_of(layers: int, runs: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows of one depth, as values and as a table."""
    rows, lines = (
        [],
        ["| arm | loss, mean of the last 20 steps (95 % interval) | seeds that learned |", "|---|---|---|"],
    )
    for name in dict.fromkeys(run["arm"] for run in runs if run["layers"] == layers):
        of_arm = [run for run in runs if (run["arm"], run["layers"]) == (name, layers)]
        losses = [float(run["loss"]) for run in of_arm]
        mean, half = mean_half(losses) if all(map(math.isfinite, losses)) else (math.inf, None)
        learned = sum(run["learned"] for run in of_arm)
        rows.append(
            {
                "arm": name,
                "layers": layers,
                "seeds": len(losses),
                "mean": mean if math.isfinite(mean) else "inf",
                "half": half,
                "learned": learned,
                "seconds": round(max(run["seconds"] for run in of_arm)),
            }
        )
        spread = "" if half is None else f" ± {half:.3f}"
        lines.append(f"| {name} | {mean:.3f}{spread} | {learned} of {len(losses)} |")
    return rows, lines


def write(out: Path, readme: Path | None) -> None:
    """Write results.json, and the tables into the README."""
    runs = read_runs(out / "runs.jsonl")
    rows, page = [], []
    for layers in sorted({run["layers"] for run in runs}):
        of_depth, lines = table_of(layers, runs)
        rows += of_depth
        page += [f"### {layers:,} layers", "", *lines, ""]
    made = {
        **about(),
        "seconds": round(sum(run["seconds"] for run in runs)),
        "marginal_entropy": TASK.marginal_entropy,
        "conditional_entropy": TASK.conditional_entropy,
        "rows": rows,
    }
    (out / "results.json").write_text(json.dumps(made, indent=1) + "\n")
    print("\n".join(page))
    if readme is not None:
        put_results(readme, page[:-1])


if __name__ == "__main__":
    main()
