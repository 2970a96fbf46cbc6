"""From runs to verdicts: learning rates by validation alone, paired differences over seeds, the rules of `compare`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clearhead.compare.verdict import Comparison, Outcomes, Status, compare_outcomes
from experiments.deep_thin.settings import CHOOSING_SEED, Arm, Setting

CONFIDENCE = 0.95
"""Of all comparisons of a task together (Bonferroni)."""
SECOND = {"chrf": "chrF", "test_nats": "test nats"}

Run = Mapping[str, Any]


def choose(setting: Setting, arm: Arm, runs: Sequence[Run]) -> float:
    """The rate of the best validation, ties by validation nats; the smallest rate when every run diverged."""
    tried = [run for run in _of(setting, arm, runs) if run["seed"] == CHOOSING_SEED and run.get("val") is not None]
    if not tried:
        return min(setting.rates)
    return float(min(tried, key=lambda run: (run["val"], run.get("val_nats", 0.0)))["rate"])


def judge(setting: Setting, runs: Sequence[Run], speed: Mapping[str, Any]) -> dict[str, Any] | None:
    """Everything that the tables say of a task, as plain values; None while it has no run that counts.

    speed: of the task's arms, as `clearhead.compare.probe.summarise` gives it.
    """
    arms = {arm.name: _arm(setting, arm, runs) for arm in setting.arms}
    if not all(arm["runs"] for arm in arms.values()):
        return None
    base = arms[setting.arms[0].name]
    for arm in arms.values():
        arm["parameters_ratio"] = arm["parameters"] / base["parameters"]
        arm["step_ms"] = 1000 * speed[arm["name"]]["median_seconds"]
        arm["step_ratio"] = speed[arm["name"]]["ratio"]
    outcomes = {arm.name: _outcomes(setting, arm, runs) for arm in setting.arms}
    level = 1.0 - (1.0 - CONFIDENCE) / len(setting.pairs)
    return {
        "name": setting.name,
        "title": setting.title,
        "metric": setting.metric,
        "digits": setting.digits,
        "steps": setting.steps,
        "batch": setting.batch,
        "arms": list(arms.values()),
        "pairs": [
            _pair(one, other, compare_outcomes(outcomes[other.name], [outcomes[one.name]], confidence=level)[0])
            for one, other in setting.pairs
        ],
    }


def _arm(setting: Setting, arm: Arm, runs: Sequence[Run]) -> dict[str, Any]:
    rate = choose(setting, arm, runs)
    mine = _of(setting, arm, runs)
    judged = [run for run in mine if run["seed"] != CHOOSING_SEED and run["rate"] == rate]
    shape = setting.shape(arm)
    answer: dict[str, Any] = {
        "name": arm.name,
        "words": arm.words,
        "layers": shape.layers,
        "stacks": 2 if setting.config(arm).architecture == "seq2seq" else 1,
        "width": shape.width,
        "rate": rate,
        "rate_at_edge": rate in (min(setting.rates), max(setting.rates)),
        "validation": {f"{run['rate']:g}": run.get("val") for run in mine if run["seed"] == CHOOSING_SEED},
        "runs": len(judged),
        "diverged": sum(run["status"] == "diverged" for run in judged),
    }
    if judged:
        answer |= {key: judged[0][key] for key in ("parameters", "outside_embedding")}
        for key in ("test", *SECOND):
            values = [run[key] for run in judged if run.get(key) is not None]
            if values:
                answer[key] = {
                    "mean": float(np.mean(values)),
                    "sd": float(np.std(values, ddof=min(1, len(values) - 1))),
                }
    return answer


def _outcomes(setting: Setting, arm: Arm, runs: Sequence[Run]) -> Outcomes:
    rate = choose(setting, arm, runs)
    status = dict.fromkeys(range(setting.seeds), Status.MISSING)
    values = {}
    for run in _of(setting, arm, runs):
        if run["seed"] in status and run["rate"] == rate:
            status[run["seed"]] = Status(run["status"])
            if run.get("test") is not None and math.isfinite(run["test"]):
                values[run["seed"]] = float(run["test"])
    return Outcomes(arm.name, status, values)


def _pair(one: Arm, other: Arm, found: Comparison) -> dict[str, Any]:
    return {
        "candidate": one.words,
        "against": other.words,
        "verdict": str(found.verdict),
        "mean": found.mean,
        "relative": found.relative,
        "low": None if found.interval is None else found.interval.low,
        "high": None if found.interval is None else found.interval.high,
        "confidence": None if found.interval is None else found.interval.confidence,
        "detectable": found.detectable,
        "differences": found.differences,
        "seeds": found.seeds,
    }


def _of(setting: Setting, arm: Arm, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if (run["task"], run["arm"], run["steps"]) == (setting.name, arm.name, setting.steps)]
