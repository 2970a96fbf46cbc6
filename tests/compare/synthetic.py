"""SYNTHETIC comparisons for tests: folders as `compare` leaves them, with numbers drawn here and not trained.

Nothing in the package reads this file. What it writes has the format of `clearhead.train`; `test_run.py` trains real
runs and so holds that format against the real one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.compare import costs, probe
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.pool import write_json
from clearhead.compare.tuning import tuning_seeds

SESSION = {
    "date": "2026-01-02T03:04:05+00:00",
    "processor": "SYNTHETIC processor",
    "cores": 2,
    "memory_bytes": 8 * 2**30,
    "device": "cpu",
    "system": "SYNTHETIC system 1",
    "versions": {"Python": "3.11.7", "torch": "2.13.0", "clearhead": "0.1.0"},
    "commit": "0123456789ab",
    "load_average": [0.1, 0.2, 0.3],
    "workers": 2,
    "command": "clearhead compare --seeds 5",
    "seconds": 571.3,
    "load_average_end": [2.0, 1.5, 0.9],
    "runs_ended": 20,
}


def plan(**changes: Any) -> ComparePlan:
    """A small plan: four arms unless told otherwise."""
    return ComparePlan.build(**{"preset": "default", "steps": 120, **changes})


def write_comparison(
    folder: Path,
    made: ComparePlan,
    *,
    effects: Mapping[str, float] | None = None,
    noise: float = 0.004,
    failures: Mapping[tuple[str, int], str] | None = None,
    missing: tuple[tuple[str, int], ...] = (),
    with_probe: bool = True,
) -> Path:
    """Write a whole comparison. `effects`: true difference per arm; `failures`: (arm, seed) -> diverged | crashed."""
    layout, rng = Layout(folder), np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    layout.plan.write_text(made.to_json())
    resolved = costs.resolve(made, {arm.name: 0.1 for arm in made.arms})
    resolved["data"] = {
        "source": "SYNTHETIC text",
        "licence": "none",
        "split": {"by": "document", "how": "by document (33 train, 5 val, 3 test)"},
        "splits": {
            name: {"documents": 3, "tokens": 4 * 10**5, "bytes": 4 * 10**5} for name in ("train", "val", "test")
        },
        "tokenizer": "bytes",
        "vocab_size": 257,
        "fingerprint": "f" * 64,
        "notes": [],
    }
    write_json(layout.resolved, resolved)
    layout.sessions.write_text(json.dumps(SESSION) + "\n")
    if with_probe:
        write_json(layout.probe, synthetic_probe(made, rng))
    effects, failures = effects or {}, failures or {}
    for seed in made.seeds:
        luck = rng.normal(0, 0.01)
        for arm in made.arms:
            if (arm.name, seed) not in missing:
                end = 2.35 + luck + effects.get(arm.name, 0.0) + rng.normal(0, noise)
                steps = resolved["arms"][arm.name]["steps"]
                write_run(layout.run(arm, seed), made, arm.name, seed, end, rng, steps, failures.get((arm.name, seed)))
    for i, rate in enumerate(made.learning_rates):
        for seed in tuning_seeds(made):
            for arm in made.arms:
                end = 2.38 + 0.03 * (i - 2) ** 2 + rng.normal(0, noise)
                write_run(layout.tuning_run(arm, rate, seed), made, arm.name, seed, end, rng, 100, None)
    return folder


def synthetic_probe(made: ComparePlan, rng: np.random.Generator) -> dict[str, Any]:
    slow = {arm.name: 1 + 0.08 * i for i, arm in enumerate(made.arms)}
    rounds = {name: list(0.1 * factor * (1 + 0.05 * rng.random(11))) for name, factor in slow.items()}
    tokens = {name: made.base.tokens_per_step for name in rounds}
    return {
        "rounds": 11,
        "warm_up": 3,
        "threads": 1,
        "device": "cpu",
        "load_before": [0.1, 0.2, 0.3],
        "load_after": [1.0, 0.4, 0.3],
        "busy": False,
        "arms": probe.summarise(rounds, made.baseline, tokens),
    }


def write_run(
    folder: Path,
    made: ComparePlan,
    arm: str,
    seed: int,
    end: float,
    rng: np.random.Generator,
    steps: int,
    failure: str | None,
) -> None:
    """Write one run that falls towards `end` bits per byte; a failing one stops at a third of its steps."""
    folder.mkdir(parents=True)
    config = costs.run_config(made.arm(arm).apply(made.base), steps=steps, seed=seed, rate=None)
    write_json(folder / "config.json", config.to_dict())
    size, every = config.tokens_per_step, config.train.eval_every
    stop = steps // 3 if failure else steps
    curve = lambda step: end + 2.4 * np.exp(-7 * step / steps) + 0.5 * (1 - step / steps)
    lines: list[dict[str, Any]] = []
    for step in range(1, stop + 1):
        place = {"step": step, "tokens": step * size, "seconds": step * 0.1, "cpu_seconds": step * 0.1}
        norm = float(np.exp(rng.normal(-1, 0.25))) * (12 if rng.random() < 0.002 else 1)
        loss = float(curve(step) * np.log(2) + rng.normal(0, 0.04))
        lines.append({"kind": "train", **place, "loss": loss, "grad_norm": norm, "lr": 1e-3, "skipped": 0})
        if step % every == 0 or step == steps:
            bits = float(curve(step) + rng.normal(0, 0.002))
            lines.append({"kind": "eval", "split": "val", **place, "bits_per_byte": bits, "loss": bits})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if failure == "crashed":
        write_json(folder / "crash.json", {"exit_code": -9, "reason": "killed by SIGKILL (often: out of memory)"})
        return
    bits = [line["bits_per_byte"] for line in lines if line["kind"] == "eval"]
    documents = [
        {
            "name": f"play {i}",
            "tokens": 1000,
            "bytes": 1000.0 * i,
            "nats": end * 1000 * i * np.log(2),
            "bits_per_byte": end,
        }
        for i in (1, 2)
    ]
    summary = {
        "steps": stop,
        "tokens": stop * size,
        "val_bits_per_byte": bits[-1] if bits else None,
        "test_bits_per_byte": None if failure else end,
        "test_documents": None if failure else documents,
        "wall_seconds": stop * 0.11,
        "cpu_seconds": stop * 0.1,
        "tokens_per_second": size / 0.11,
        "peak_memory_bytes": 4.1e8 + 1e6 * float(rng.random()),
    }
    reason = "loss or gradient not finite in 5 steps in a row" if failure else ""
    write_json(folder / "result.json", {"status": failure or "finished", "reason": reason, "summary": summary})
