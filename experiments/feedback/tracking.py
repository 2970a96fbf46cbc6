"""State tracking: which models are trained for how long, and what the runs say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from experiments.feedback.task import band_names
from experiments.feedback.train import Setup, run_one
from experiments.running import mean_half

SEEDS = 3
JUDGED = "16-31"
"""The band that decides: twice the window and more."""
STEPS = 500
SETUPS = (
    *(Setup("decoder", layers) for layers in (1, 2, 4)),
    *(Setup("feedback", layers) for layers in (1, 2)),
    *(Setup("feedback", 2, memory) for memory in ("embedding", "last")),
)
QUICK = (Setup("decoder", 1), Setup("feedback", 1))

Run = dict[str, Any]
Job = tuple[Setup, int, int]
"""Model, seed, steps."""


def jobs(seeds: int = SEEDS, *, quick: bool = False) -> list[Job]:
    """What the results are made of, seed by seed."""
    if quick:
        return [(setup, 0, 20) for setup in QUICK]
    return [(setup, seed, STEPS) for seed in range(seeds) for setup in SETUPS]


def train_one(job: Job) -> Run:
    """Train one model with one seed."""
    setup, seed, steps = job
    torch.set_num_threads(1)
    return run_one(setup, seed=seed, steps=steps)


def key_of_job(job: Job) -> tuple[str, int, int]:
    """What makes a run another one."""
    return job[0].name, job[1], job[2]


def key_of_run(run: Run) -> tuple[str, int, int]:
    """See `key_of_job`."""
    return run["model"], run["seed"], run["steps"]


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Each model at each number of steps: mean and half of the interval over seeds, by band."""
    rows = []
    order = [setup.name for setup in SETUPS]
    for key in sorted({(run["model"], run["steps"]) for run in runs}, key=lambda key: (order.index(key[0]), key[1])):
        own = [run for run in runs if (run["model"], run["steps"]) == key]
        bands = {}
        for band in band_names():
            found = [run["accuracy"][band] for run in own if run["accuracy"][band] is not None]
            mean, half = mean_half(found) if found else (None, None)
            bands[band] = {"mean": mean, "half": half, "all": found}
        rows.append(
            {
                "model": key[0],
                "steps": key[1],
                "seeds": len(own),
                "parameters": own[0]["parameters"],
                "bands": bands,
                "shares": [run["shares"] for run in own if run["shares"] is not None],
                "cpu_seconds": sum(run["cpu_seconds"] for run in own) / len(own),
            }
        )
    return rows


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy by steps since the last set; the rows are models."""
    names = band_names()
    lines = [
        f"| model | steps | seeds | {' | '.join(names)} | CPU s |",
        f"|---|---|---|{'---|' * len(names)}---|",
    ]
    for row in rows:
        cells = [_cell(row["bands"][name]) for name in names]
        lines.append(
            f"| {row['model']} | {row['steps']} | {row['seeds']} | {' | '.join(cells)} | {row['cpu_seconds']:.0f} |"
        )
    return lines


def judge(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the falsifier struck: feedback with 1 layer below .9, or a plain decoder above .4, 16 to 31 steps on."""
    found = {row["model"]: row["bands"][JUDGED]["all"] for row in rows if row["steps"] == STEPS}
    own = found.get(Setup("feedback", 1).name, [])
    plain = [value for setup in SETUPS if setup.architecture == "decoder" for value in found.get(setup.name, [])]
    lines, where = [], f"{JUDGED}, {STEPS} steps"
    if own:
        lines.append(
            f"feedback with 1 layer at {where}: worst of {len(own)} seeds {min(own):.3f}, claimed at "
            f"least .9: {'holds' if min(own) >= 0.9 else 'fails'}"
        )
    if plain:
        lines.append(
            f"plain decoders at {where}: best of {len(plain)} runs {max(plain):.3f}, claimed at most "
            f".4: {'holds' if max(plain) <= 0.4 else 'fails'}"
        )
    return lines


def _cell(band: dict[str, Any]) -> str:
    if band["mean"] is None:
        return "-"
    return f"{band['mean']:.2f}" + (f" ± {band['half']:.2f}" if band["half"] is not None else "")
