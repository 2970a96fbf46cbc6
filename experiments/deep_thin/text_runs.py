"""Language modelling by `clearhead.compare`, translation by the package's trainer: compare is about decoders so far.

Single runs at another arm's rate are the trainer's in both: the same configuration as the comparison's own.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from clearhead.compare.arms import Arm as CompareArm
from clearhead.compare.arms import apply_overrides
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.run import compare
from clearhead.data.config import DataConfig
from clearhead.train.config import RunConfig, TrainConfig
from clearhead.train.loop import train
from experiments import equal_rate
from experiments.deep_thin.settings import CHOOSING_SEED, Arm, Setting, outside_embedding


def run_config(setting: Setting, arm: Arm, rate: float, seed: int, *, judged: bool) -> RunConfig:
    """One run of the trainer. A run that chooses a rate scores next to nothing of the test split."""
    model = setting.config(arm)
    translation = model.architecture == "seq2seq"
    tokenizer: dict[str, Any] = {"tokenizer": "bpe", "vocab_size": model.vocab_size} if translation else {}
    return RunConfig(
        model=model,
        data=DataConfig(source=setting.source, context=model.context, **tokenizer),
        optim=setting.optim(rate),
        train=TrainConfig(
            steps=setting.steps,
            batch_size=setting.batch,
            seed=seed,
            eval_every=0,
            eval_tokens=setting.validate,
            test_tokens=setting.test if judged else 1,
            checkpoint_every=0,
            threads=1,
        ),
    )


def train_text(setting: Setting, arm: Arm, rate: float, seed: int, folder: Path, *, judged: bool) -> dict[str, Any]:
    """Train one arm of the translation, or of the language modelling."""
    folder = folder / setting.name / arm.name / f"lr{rate:g}-seed{seed}-{setting.steps}"
    train(run_config(setting, arm, rate, seed, judged=judged), folder, progress=False)
    return row_of(folder, judged=judged)


def language_plan(setting: Setting) -> ComparePlan:
    """The comparison; `clearhead compare` chooses the learning rates on seeds of its own, from `CHOOSING_SEED` on."""
    base_arm = setting.arms[0]
    base = run_config(setting, base_arm, setting.rates[0], 0, judged=True)
    arms = []
    for arm in setting.arms:
        changed = {f"model.{key}": value for key, value in setting.overrides(arm).items()}
        same = apply_overrides(base, changed) == base
        arms.append(CompareArm(arm.name, {} if same else changed))
    return ComparePlan(
        base=base,
        arms=tuple(arms),
        baseline=base_arm.name,
        seeds=tuple(range(setting.seeds)),
        learning_rates=setting.rates,
        tuning_seeds=1,
    )


def compare_language(setting: Setting, folder: Path, workers: int) -> list[dict[str, Any]]:
    """Run the comparison, or what is missing of it, and return its runs as lines of this experiment."""
    plan, layout = language_plan(setting), Layout(folder / f"{setting.name}-{setting.steps}")
    layout.folder.parent.mkdir(parents=True, exist_ok=True)
    results = compare(dataclasses.replace(plan, workers=workers), layout.folder)
    chosen = {arm["name"]: arm["chosen"] for arm in results["tuning"]["arms"]}
    rows = []
    further = list(equal_rate.further_records(plan, layout.folder, chosen))
    for arm in plan.arms:
        runs = [(rate, CHOOSING_SEED, layout.tuning_run(arm, rate, CHOOSING_SEED)) for rate in setting.rates]
        runs += [(chosen[arm.name], seed, layout.run(arm, seed)) for seed in plan.seeds]
        runs += [(rate, record.seed, record.folder) for rate, record in further if record.arm == arm.name]
        for rate, seed, run in runs:
            key = {"task": setting.name, "arm": arm.name, "rate": rate, "seed": seed, "steps": setting.steps}
            rows.append({**key, **row_of(run, judged=seed != CHOOSING_SEED)})
    return rows


def row_of(folder: Path, *, judged: bool) -> dict[str, Any]:
    """What counts of a run's result.json."""
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    summary = result["summary"]
    translation = summary["task"] == "translation"
    row = {
        "status": result["status"],
        "parameters": summary["parameters"]["total"],
        "outside_embedding": outside_embedding(summary["parameters"]),
        "tokens": summary["tokens"],
        "val": summary["val_loss" if translation else "val_bits_per_byte"],
        "step_ms": 1000 * summary["step_seconds"]["median"],
        "seconds": round(summary["wall_seconds"], 1),
    }
    if judged:
        row["test"] = summary["test_nats_per_token" if translation else "test_bits_per_byte"]
        if translation:
            row["chrf"] = summary["test_chrf"]
    return row
