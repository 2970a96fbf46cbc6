"""Real text by `clearhead compare`: Selective Self-Attention whole and in parts against softmax and one learned scalar.

The package's quick preset (Shakespeare's bytes, 2 layers, width 64, 600 steps), with a grid of learning rates for every
arm, chosen on validation text and on seeds that the verdict never sees. Afterwards every model is read again for the
spikiness of its maps and the norm of W_q W_k^T.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from clearhead.compare.arms import Arm
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import load_record
from clearhead.compare.run import compare
from clearhead.compare.verdict import Status
from clearhead.data.text import prepare
from clearhead.models.io import load_model
from clearhead.train.checkpoint import newest_model
from experiments.selective import spikiness
from experiments.selective.arms import ARMS, BASELINE, WHOLE

RATES = (1.25e-3, 2.5e-3, 5e-3)
STEPS = 600
ROWS = 8
"""Windows of validation text on which maps are looked at."""
NAME = "text.json"


def plan(*, seeds: int, workers: int, quick: bool = False) -> ComparePlan:
    """Eight arms; quick: two, two steps."""
    names = (BASELINE, WHOLE) if quick else tuple(ARMS)
    arms = [Arm(name, {f"model.{key}": value for key, value in ARMS[name].items()}) for name in names]
    small: dict[str, Any] = {"train.eval_tokens": 256, "train.test_tokens": 256, "train.batch_size": 2}
    return ComparePlan.build(
        preset="quick",
        arms=arms,
        baseline=BASELINE,
        seeds=2 if quick else seeds,
        steps=2 if quick else STEPS,
        learning_rates=() if quick else RATES,
        overrides={"train.checkpoint_every": 0} | (small | {"optim.warmup_steps": 1} if quick else {}),
        workers=workers,
    )


def run(chosen: ComparePlan, folder: Path, out: Path) -> None:
    """Run the comparison in `folder`, or what is missing of it, and keep what counts in `out`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    results = compare(chosen, folder)
    layout = Layout(folder)
    context = chosen.base.data.context
    seen = torch.from_numpy(prepare(chosen.base.data).batch("val", ROWS, context, 0, 0).tokens)
    edges = {arm["name"] for arm in (results["tuning"] or {"arms": []})["arms"] if arm["at_edge"]}
    arms = []
    for arm in results["arms"]:
        runs, records = (
            [],
            [load_record(layout.run(chosen.arm(arm["name"]), seed), arm["name"], seed) for seed in chosen.seeds],
        )
        for record in records:
            finished = record.status is Status.FINISHED
            maps = spikiness.of_model(load_model(newest_model(record.folder)), seen) if finished else None
            runs.append({"seed": record.seed, "status": str(record.status), "test": record.test, "maps": maps})
        kept = ("name", "overrides", "test", "comparison", "speed", "cpu_seconds")
        arms.append(
            {key: arm[key] for key in kept}
            | {"parameters": arm["setup"]["parameters"], "runs": runs}
            | {"rate": records[0].learning_rate, "at_edge": arm["name"] in edges}
        )
    kept_results = {key: results[key] for key in ("headline", "plan", "budget", "sessions", "tuning")}
    (out / NAME).write_text(json.dumps({**kept_results, "arms": arms}, indent=1) + "\n")


def read(out: Path) -> dict[str, Any] | None:
    """What `run` kept; None before the first run."""
    path = out / NAME
    return json.loads(path.read_text()) if path.exists() else None


def as_runs(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparison's runs in the form that `judge` takes."""
    return [
        {"arm": arm["name"], "setting": "text", "status": run["status"]} | {k: run[k] for k in ("seed", "test", "maps")}
        for arm in found["arms"]
        for run in arm["runs"]
    ]
