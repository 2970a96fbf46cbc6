"""LASER against softmax on real text by `clearhead compare`: alone, with a learned temperature, and with values four
times as large; every arm at its own learning rate of the same grid, chosen on validation with seeds of their own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clearhead.attention.plugins import VARIABLE, load_plugins
from clearhead.compare import statistics as st
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import Record, load_record
from clearhead.compare.run import compare
from clearhead.compare.verdict import Status
from clearhead.data.text import prepare
from clearhead.models.io import load_model
from clearhead.models.make import build_model
from clearhead.train.checkpoint import newest_model
from experiments.laser import look

STEPS, RATES = 1000, (1.5e-3, 3e-3, 6e-3)
FACTOR = 4.0
PLUGIN = Path(__file__).with_name("scaled_values.py").resolve()
ARMS = (
    "softmax:",
    "laser: model.attention=laser",
    "softmax+learned: model.attention=softmax+learned",
    "laser+learned: model.attention=laser+learned",
    f"softmax, values x 4: model.attention=scaled_mean:{FACTOR}",
    f"laser, values x 4: model.attention=scaled_laser:{FACTOR}",
)
PAIRS = (
    ("laser", "softmax"),
    ("laser+learned", "softmax+learned"),
    ("laser, values x 4", "softmax, values x 4"),
)
"""What LASER adds, all else alike: the claim is judged on these three, together."""
BASE = {
    "train.eval_every": 50,
    "train.eval_tokens": 16_384,
    "train.test_tokens": 65_536,
}
LOOKED = 4
"""Windows of validation text."""
NAME = "text.json"


def use_plugin() -> None:
    """Make the two scaled reads known, here and in every process that is started from here."""
    named = [text for text in os.environ.get(VARIABLE, "").split(os.pathsep) if text]
    if str(PLUGIN) not in named:
        os.environ[VARIABLE] = os.pathsep.join([*named, str(PLUGIN)])
    load_plugins()


def plan(*, seeds: int, workers: int, quick: bool = False) -> ComparePlan:
    """Six arms on Shakespeare's bytes. Its base is compare's default preset: 2 layers, width 96, 128 tokens."""
    use_plugin()
    small: dict[str, Any] = {
        "model.width": 32,
        "model.heads": 1,
        "train.eval_tokens": 256,
        "train.test_tokens": 256,
        "train.batch_size": 2,
        "train.eval_every": 2,
        "optim.warmup_steps": 1,
    }
    return ComparePlan.build(
        preset="default",
        arms=(ARMS[0], ARMS[1], ARMS[5]) if quick else ARMS,
        seeds=2 if quick else seeds,
        steps=4 if quick else STEPS,
        learning_rates=() if quick else RATES,
        overrides=BASE | (small if quick else {}),
        workers=workers,
    )


def run(chosen: ComparePlan, folder: Path, out: Path) -> None:
    """Run the comparison in `folder`, or what is missing of it, and keep what counts in `out`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    results = compare(chosen, folder)
    layout = Layout(folder)
    tuned = {one["name"]: one for one in (results["tuning"] or {"arms": []})["arms"]}
    kept = ("name", "overrides", "test", "val", "comparison", "speed", "cpu_seconds", "reach", "gradient", "failures")
    arms = []
    for arm in results["arms"]:
        records = [load_record(layout.run(chosen.arm(arm["name"]), seed), arm["name"], seed) for seed in chosen.seeds]
        finished = [record for record in records if record.status is Status.FINISHED]
        arms.append(
            {key: arm[key] for key in kept}
            | {
                "parameters": arm["setup"]["parameters"]["total"],
                "rate": _chosen(tuned.get(arm["name"]), records),
                "tuning": tuned.get(arm["name"]),
                "tests": {str(record.seed): record.test for record in records},
                "tokens": _curve(finished[0].evals["tokens"]) if finished else [],
                "bits": [_curve(record.evals["bits"]) for record in finished],
                "looks": look.summary([_look(chosen, record) for record in finished]),
            }
        )
    probe = {key: value for key, value in results["probe"].items() if key != "arms"}
    kept_results = {key: results[key] for key in ("headline", "plan", "budget", "sessions")}
    found = {**kept_results, "probe": probe, "arms": arms, "pairs": pairs(arms)}
    (out / NAME).write_text(json.dumps(found, indent=1) + "\n")


def _chosen(tuned: Mapping[str, Any] | None, records: list[Record]) -> float | None:
    return records[0].learning_rate if tuned is None else tuned["chosen"]


def _look(chosen: ComparePlan, record: Record) -> dict[str, Any]:
    """Look into a run's model before its first step and after its last."""
    config = chosen.arm(record.arm).apply(chosen.base)
    batch = prepare(config.data).batch("val", LOOKED, config.data.context, 0, 0)
    tokens_bt, targets_bt = torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets)
    models = {
        "start": build_model(config.own_model, seed=record.seed),
        "end": load_model(newest_model(record.folder)),
    }
    return {when: look.look(model, tokens_bt, targets_bt) for when, model in models.items()}


def pairs(arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each of `PAIRS`, paired by seed, with intervals that hold for all of them together."""
    by_name = {arm["name"]: arm for arm in arms}
    rows: list[dict[str, Any]] = []
    for name, against in PAIRS:
        if name not in by_name or against not in by_name:
            continue
        tests = [
            {int(seed): value for seed, value in by_name[one]["tests"].items() if value is not None}
            for one in (name, against)
        ]
        seeds, d = st.paired_differences(tests[0], tests[1])
        interval = st.student_interval(d, comparisons=len(PAIRS))
        sd = float(d.std(ddof=1)) if len(seeds) > 1 else 0.0
        rows.append(
            {
                "name": name,
                "against": against,
                "seeds": len(seeds),
                "failed": [
                    len(by_name[one]["tests"]) - len(found) for one, found in zip((name, against), tests, strict=True)
                ],
                "mean": float(d.mean()) if seeds else None,
                "interval": None if interval is None else [interval.low, interval.high],
                "detectable": st.detectable_effect(sd, len(seeds), comparisons=len(PAIRS)),
                "speed_ratio": _speed_ratio(by_name[name], by_name[against]),
                **_reach(by_name[name], by_name[against]),
            }
        )
    return rows


def _speed_ratio(arm: Mapping[str, Any], base: Mapping[str, Any]) -> float | None:
    """Seconds of a step over the other's, by the probe."""
    if not arm["speed"] or not base["speed"]:
        return None
    return float(arm["speed"]["median_seconds"] / base["speed"]["median_seconds"])


def _reach(arm: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens to the other arm's best validation value of the same seed, as a share of what that arm read to get there.

    Judged only where all runs of both finished, since the curves are kept in the order of the finished seeds.
    """
    shares = []
    if len(arm["bits"]) == len(base["bits"]) == len(arm["tests"]):
        for own, other in zip(arm["bits"], base["bits"], strict=True):
            best = int(np.argmin(other))
            tokens = st.first_reach(arm["tokens"], own, other[best])
            shares.append(None if tokens is None else tokens / base["tokens"][best])
    hit = sorted(share for share in shares if share is not None)
    most = 2 * len(hit) > len(shares) > 0
    return {"reached": len(hit), "of": len(shares), "share": float(np.median(hit)) if most else None}


def read(out: Path) -> dict[str, Any] | None:
    """What `run` kept; None before the first run."""
    path = out / NAME
    return json.loads(path.read_text()) if path.exists() else None


def _curve(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
