"""Real text by `clearhead compare`: Selective Self-Attention whole and in parts against softmax and one learned scalar.

The package's quick preset (Shakespeare's bytes, 2 layers, width 64, 600 steps), with a grid of learning rates for every
arm, chosen on validation text and on seeds that the verdict never sees. Afterwards every model is read again for the
spikiness of its maps and the norm of W_q W_k^T. Claims between two arms of different rates wait for runs at one rate;
those that the comparison did not make itself are made beside its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from clearhead.compare.arms import Arm
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import Record, load_record
from clearhead.compare.run import compare
from clearhead.compare.verdict import Status
from clearhead.data.text import prepare
from clearhead.models.io import load_model
from clearhead.train.checkpoint import newest_model
from experiments import equal_rate
from experiments.selective import claims, spikiness
from experiments.selective.arms import ARMS, BASELINE, WHOLE
from experiments.selective.judge import judge, wanted

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
        records = [load_record(layout.run(chosen.arm(arm["name"]), seed), arm["name"], seed) for seed in chosen.seeds]
        runs = [_looked(record, seen) for record in records]
        kept = ("name", "overrides", "test", "comparison", "speed", "cpu_seconds")
        arms.append(
            {key: arm[key] for key in kept}
            | {"parameters": arm["setup"]["parameters"], "runs": runs}
            | {"rate": records[0].learning_rate, "at_edge": arm["name"] in edges}
        )
    kept_results = {key: results[key] for key in ("headline", "plan", "budget", "sessions", "tuning")}
    found = {**kept_results, "arms": arms, "again": _again(chosen, folder, arms, seen)}
    judged = [
        one
        for own in (claims.of_text(), claims.of_maps(["text"]))
        for one in judge(own, as_runs(found), found["again"])
    ]
    equal_rate.train_in_folder(chosen, folder, list(dict.fromkeys((arm, rate) for arm, _, rate in wanted(judged))))
    found["again"] = _again(chosen, folder, arms, seen)
    (out / NAME).write_text(json.dumps(found, indent=1) + "\n")


def _looked(record: Record, seen: torch.Tensor) -> dict[str, Any]:
    """What counts of a run."""
    finished = record.status is Status.FINISHED
    maps = spikiness.of_model(load_model(newest_model(record.folder)), seen) if finished else None
    return {"seed": record.seed, "status": str(record.status), "test": record.test, "maps": maps}


def _again(chosen: ComparePlan, folder: Path, arms: list[dict[str, Any]], seen: torch.Tensor) -> list[dict[str, Any]]:
    """The runs at a rate that another arm chose, in the form that `judge` takes."""
    rates = {arm["name"]: arm["rate"] for arm in arms}
    return [
        {"arm": record.arm, "setting": "text", "rate": rate} | _looked(record, seen)
        for rate, record in equal_rate.further_records(chosen, folder, rates)
    ]


def read(out: Path) -> dict[str, Any] | None:
    """What `run` kept; None before the first run."""
    path = out / NAME
    return json.loads(path.read_text()) if path.exists() else None


def as_runs(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The comparison's runs in the form that `judge` takes."""
    return [
        {"arm": arm["name"], "setting": "text", "rate": arm["rate"], "status": run["status"]}
        | {k: run[k] for k in ("seed", "test", "maps")}
        for arm in found["arms"]
        for run in arm["runs"]
    ]
