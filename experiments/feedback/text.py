"""Feedback against the plain decoder on real text, by `clearhead compare`: equal tokens, and what equal time shows.

All arms see 64 tokens back, so nothing but the architecture differs. `feedback_share_kv=false` gives a feedback model
the plain decoder's matrices and no fewer: with equal depth it has 67 parameters more (the mixture, and a norm).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import load_record
from clearhead.compare.run import compare
from experiments.running import mean_half

STEPS = 200
FEEDBACK = "model.architecture=feedback model.feedback_share_kv=false"
ARMS = (
    "plain, 2 layers:",
    f"feedback, 2 layers: {FEEDBACK}",
    f"feedback, 1 layer: {FEEDBACK} model.layers=1",
    "plain, 1 layer: model.layers=1",
)
BASE = {
    "model.width": 64,
    "model.heads": 2,
    "model.context": 64,
    "data.context": 64,
    "train.batch_size": 32,
    "train.eval_every": 25,
    "train.eval_tokens": 4096,
    "train.test_tokens": 32768,
    "train.checkpoint_every": 0,
    "optim.lr": 3e-3,
    "optim.warmup_steps": 20,
}
NAME = "text.json"


def plan(*, seeds: int, workers: int, quick: bool = False) -> ComparePlan:
    """Four arms on Shakespeare's bytes. Its base is the preset "quick" with other sizes."""
    small = {"train.eval_tokens": 256, "train.test_tokens": 256, "train.batch_size": 2, "optim.warmup_steps": 1}
    return ComparePlan.build(
        preset="quick",
        arms=ARMS[:2] if quick else ARMS,
        seeds=2 if quick else seeds,
        steps=2 if quick else STEPS,
        overrides=BASE | (small if quick else {}),
        workers=workers,
    )


def run(chosen: ComparePlan, folder: Path, out: Path) -> None:
    """Run the comparison in `folder`, or what is missing of it, and keep what counts in `out`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    results = compare(chosen, folder)
    layout = Layout(folder)
    arms = []
    for arm in results["arms"]:
        records = [load_record(layout.run(chosen.arm(arm["name"]), seed), arm["name"], seed) for seed in chosen.seeds]
        kept = ("name", "overrides", "test", "val", "comparison", "speed", "cpu_seconds", "reach")
        arms.append(
            {key: arm[key] for key in kept}
            | {
                "parameters": arm["setup"]["parameters"]["total"],
                "flops_per_token": arm["setup"]["flops_per_token"],
                "tests": [record.test for record in records],
                "tokens": _curve(records[0].evals["tokens"]),
                "bits": [_curve(record.evals["bits"]) for record in records],
            }
        )
    probe = {key: value for key, value in results["probe"].items() if key != "arms"}
    kept_results = {key: results[key] for key in ("headline", "plan", "budget", "sessions")}
    (out / NAME).write_text(json.dumps({**kept_results, "probe": probe, "arms": arms}, indent=1) + "\n")


def read(out: Path) -> dict[str, Any] | None:
    """What `run` kept; None before the first run."""
    path = out / NAME
    return json.loads(path.read_text()) if path.exists() else None


def equal_time(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Of each arm, validation bits per byte when the baseline's run ends, and less the baseline's then.

    Time is the speed probe's: one thread, arms in turn. A curve is read between its evaluations in a straight line; an
    arm that has ended by then counts with its last value.
    """
    base = found["arms"][0]
    end = _seconds(base)[-1]
    rows = []
    for arm in found["arms"]:
        bits = [float(np.interp(end, _seconds(arm), curve)) for curve in arm["bits"]]
        paired = [one - curve[-1] for one, curve in zip(bits, base["bits"], strict=True)]
        mean, half = mean_half(paired)
        steps = int(end / arm["speed"]["median_seconds"])
        rows.append({"name": arm["name"], "steps": steps, "bits": bits, "difference": mean, "half": half})
    return rows


def page(found: dict[str, Any] | None) -> list[str]:
    """The tables and verdicts."""
    if found is None:
        return ["Text: not finished."]
    base = found["arms"][0]
    lines = [
        "| model | parameters | test bits per byte | against plain, 2 layers | step, ratio | tokens/s "
        "| val bits per byte at equal time |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, timed in zip(found["arms"], equal_time(found), strict=True):
        test, half = mean_half(arm["tests"])
        compared, speed = arm["comparison"], arm["speed"]
        against = "" if arm is base else f"{compared['mean']:+.3f} {_interval(compared['interval'])}"
        later = f"{sum(timed['bits']) / len(timed['bits']):.3f} after {timed['steps']} steps"
        lines.append(
            f"| {arm['name']} | {arm['parameters']:,} | {test:.3f}{'' if half is None else f' ± {half:.3f}'} "
            f"| {against} | {speed['ratio']:.2f} | {speed['tokens_per_second']:,.0f} "
            f"| {later} |"
        )
    lines.append("")
    for arm in found["arms"][1:]:
        lines.append(f"- {arm['comparison']['sentence']}")
    return lines


def _interval(interval: dict[str, float] | None) -> str:
    return "" if interval is None else f"[{interval['low']:+.3f}, {interval['high']:+.3f}]"


def _seconds(arm: dict[str, Any]) -> list[float]:
    speed = arm["speed"]
    return [tokens * speed["median_seconds"] / speed["tokens_per_step"] for tokens in arm["tokens"]]


def _curve(values: Any) -> list[float]:
    return [round(float(value), 5) for value in values]
