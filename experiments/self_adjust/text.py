"""Forms, positions and controls on real text, by `clearhead compare`.

One comparison for the forms and controls (rotary positions), one for each other position, and one of four times the
steps, at the rates that the first one chose. Every arm of all but the last gets the same grid of learning rates on
seeds of their own. Runs that a verdict between different rates waits for are made beside the comparison's own.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import load_record
from clearhead.compare.run import compare
from clearhead.compare.statistics import gradient_tail
from experiments import equal_rate
from experiments.self_adjust.arms import (
    BASELINE,
    DEFAULT,
    DETACHED,
    EXPLAINING,
    FORMS,
    MAIN,
    POSITIONS,
    ROW_SUM,
    arm,
    overrides,
    use_controls,
)

STEPS, LONGER = 400, 4
RATES = (1.5e-3, 3e-3, 6e-3)
TUNING_SEEDS = 1
BASE = {
    "model.width": 64,
    "model.heads": 2,
    "model.position": MAIN,
    "train.batch_size": 4,
    "train.eval_every": 80,
    "train.eval_tokens": 8192,
    "train.test_tokens": 65_536,
    "train.checkpoint_every": 0,
    "optim.warmup_steps": 40,
}
"""On the preset "quick": Shakespeare's bytes, 128 tokens of context, two layers, the small initialisation."""
QUICK = {
    "train.eval_every": 2,
    "train.eval_tokens": 256,
    "train.test_tokens": 256,
    "train.batch_size": 2,
    "optim.warmup_steps": 1,
}
FORMS_PLAN, LONG_PLAN = "forms", "longer"
LONG_ARMS = (BASELINE, DEFAULT, ROW_SUM)
POSITION_ARMS = (BASELINE, DEFAULT, DETACHED)
NAME = "text.json"
Wanted = Callable[[Mapping[str, Any]], list[tuple[str, float]]]


def plans(*, seeds: int, workers: int, quick: bool = False) -> Iterator[tuple[str, ComparePlan]]:
    """The comparisons that depend on no other one's outcome, by name."""
    if quick:
        yield FORMS_PLAN, _plan((BASELINE, DEFAULT, ROW_SUM), {}, 2, workers, quick=True)
        return
    yield FORMS_PLAN, _plan((BASELINE, *FORMS, *EXPLAINING), {}, seeds, workers)
    for position in POSITIONS:
        yield position, _plan(POSITION_ARMS, {"model.position": position}, seeds, workers)


def longer(rates: Mapping[str, float], *, seeds: int, workers: int) -> ComparePlan:
    """Four times the steps, each arm at the rate that it chose in the shorter runs."""
    texts = [f"{name}: {overrides(name)} optim.lr={rates[name]!r}" for name in LONG_ARMS]
    steps = STEPS * LONGER
    more = {"train.eval_every": BASE["train.eval_every"], "optim.warmup_steps": BASE["optim.warmup_steps"]}
    return ComparePlan.build(
        preset="quick", arms=texts, seeds=seeds, steps=steps, overrides=BASE | more, workers=workers
    )


def _plan(
    names: Sequence[str], changes: Mapping[str, Any], seeds: int, workers: int, *, quick: bool = False
) -> ComparePlan:
    made = ComparePlan.build(
        preset="quick",
        arms=[arm(name) for name in names],
        seeds=seeds,
        steps=2 if quick else STEPS,
        learning_rates=() if quick else RATES,
        overrides={**BASE, **(QUICK if quick else {}), **changes},
        workers=workers,
    )
    return dataclasses.replace(made, tuning_seeds=TUNING_SEEDS)


def run(folder: Path, out: Path, wanted: Wanted, *, seeds: int, workers: int, quick: bool) -> None:
    """Run the comparisons below `folder`, or what is missing of them, and keep what counts in `out`.

    wanted: says which arms at which rates the verdicts on a comparison wait for.
    """
    use_controls()
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    for name, plan in plans(seeds=seeds, workers=workers, quick=quick):
        found[name] = _compared(name, plan, folder / name, wanted)
        _write(out, found)
    if not quick:
        rates = {one["name"]: one["rate"] for one in found[FORMS_PLAN]["arms"]}
        plan = longer(rates, seeds=seeds, workers=workers)
        found[LONG_PLAN] = _compared(LONG_PLAN, plan, folder / LONG_PLAN, wanted)
        _write(out, found)


def _compared(name: str, plan: ComparePlan, folder: Path, wanted: Wanted) -> dict[str, Any]:
    results = compare(plan, folder)
    found = keep(plan, results, folder)
    equal_rate.train_in_folder(plan, folder, wanted({name: found}))
    return keep(plan, results, folder)


def keep(plan: ComparePlan, results: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What the tables need of one comparison."""
    layout, tuned = Layout(folder), results["tuning"]
    chosen = {row["name"]: row for row in tuned["arms"]} if tuned else {}
    arms = []
    for one in results["arms"]:
        name = one["name"]
        records = [load_record(layout.run(plan.arm(name), seed), name, seed) for seed in plan.seeds]
        tails = [gradient_tail(record.train["grad_norm"]) for record in records if "grad_norm" in record.train]
        arms.append(
            {
                "name": name,
                "overrides": one["overrides"],
                "parameters": one["setup"]["parameters"]["total"],
                "rate": chosen[name]["chosen"] if chosen else plan.arm(name).apply(plan.base).optim.lr,
                "at_edge": bool(chosen and chosen[name]["at_edge"]),
                "grid": {f"{row['rate']:g}": row["val"] for row in chosen[name]["rates"]} if chosen else {},
                "status": {str(record.seed): record.status.value for record in records},
                "tests": {str(record.seed): record.test for record in records if record.test is not None},
                "tokens": [int(value) for value in records[0].evals.get("tokens", [])],
                "bits": {
                    str(record.seed): [round(float(value), 5) for value in record.evals.get("bits", [])]
                    for record in records
                },
                "gradient": [
                    {"median": tail.median, "p99": tail.p99, "largest": tail.largest, "spikes": tail.spikes}
                    for tail in tails
                    if tail is not None
                ],
                "speed": one["speed"]["ratio"] if one["speed"] else None,
                "cpu_seconds": one["cpu_seconds"]["mean"],
            }
        )
    rates = {one["name"]: one["rate"] for one in arms}
    again = [
        {"arm": record.arm, "rate": rate, "seed": record.seed, "status": record.status.value, "value": record.test}
        for rate, record in equal_rate.further_records(plan, folder, rates)
    ]
    return {
        "steps": plan.base.total_steps,
        "seeds": list(plan.seeds),
        "arms": arms,
        "again": again,
        "sessions": results["sessions"],
    }


def read(out: Path) -> dict[str, Any] | None:
    """What `run` kept; None before the first run."""
    path = out / NAME
    return json.loads(path.read_text()) if path.exists() else None


def _write(out: Path, found: Mapping[str, Any]) -> None:
    (out / NAME).write_text(json.dumps(found, indent=1) + "\n")
