"""LASER against softmax on real text by `clearhead compare`: alone, with a learned temperature, and with values four
times as large; every arm at its own learning rate of the same grid, chosen on validation with seeds of their own. Runs
that a verdict between different rates waits for are made beside the comparison's own (experiments/equal_rate.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
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
from experiments import equal_rate
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
    rows = pairs(arms, _again(chosen, folder, arms))
    checks = [row["equal_rate"] for row in rows if row["equal_rate"] is not None]
    equal_rate.train_in_folder(chosen, folder, list(dict.fromkeys((one["anew"], one["rate"]) for one in checks)))
    again = _again(chosen, folder, arms)
    found = {**kept_results, "probe": probe, "arms": arms, "again": again, "pairs": pairs(arms, again)}
    (out / NAME).write_text(json.dumps(found, indent=1) + "\n")


def _again(chosen: ComparePlan, folder: Path, arms: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs at a rate that another arm chose."""
    rates = {arm["name"]: arm["rate"] for arm in arms}
    return [
        {"arm": record.arm, "rate": rate, "seed": record.seed, "status": str(record.status), "value": record.test}
        for rate, record in equal_rate.further_records(chosen, folder, rates)
    ]


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


def pairs(arms: list[dict[str, Any]], again: Sequence[Mapping[str, Any]] = ()) -> list[dict[str, Any]]:
    """Each of `PAIRS`, paired by seed, with intervals that hold for all of them together.

    again: runs at a rate that another arm chose, for verdicts that must hold at one rate.
    """
    by_name = {arm["name"]: arm for arm in arms}
    runs = [
        equal_rate.Run(name, arm["rate"], int(seed), "diverged" if value is None else "finished", value)
        for name, arm in by_name.items()
        for seed, value in arm["tests"].items()
    ]
    runs += [equal_rate.Run(**one) for one in again]
    seeds = sorted({run.seed for run in runs})
    ledger = equal_rate.Ledger(runs, {name: arm["rate"] for name, arm in by_name.items()}, seeds)
    rows: list[dict[str, Any]] = []
    for name, against in PAIRS:
        if name not in by_name or against not in by_name:
            continue
        found = ledger.against(against, [name], confidence=1.0 - 0.05 / len(PAIRS))[name]
        rows.append(
            {
                "name": name,
                "against": against,
                "seeds": len(found.seeds),
                "failed": [sum(value is None for value in by_name[one]["tests"].values()) for one in (name, against)],
                "verdict": str(found.verdict),
                "equal_rate": equal_rate.plain(found.equal_rate),
                "mean": found.mean,
                "interval": None if found.interval is None else [found.interval.low, found.interval.high],
                "detectable": found.detectable,
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
    """What `run` kept, its pairs judged anew; None before the first run."""
    path = out / NAME
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text())
    return found | {"pairs": pairs(found["arms"], found.get("again", ()))}


def _curve(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
