"""From runs to verdicts: learning rates by validation alone, paired differences over seeds, the rules of `compare`.

A verdict between arms of different rates must hold at one rate too (experiments/equal_rate.py); until those runs are
there the pair is not judged, and the page says what it was at the rates that each chose.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clearhead.compare.verdict import Comparison, Verdict
from experiments import equal_rate
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
    return {
        "name": setting.name,
        "title": setting.title,
        "metric": setting.metric,
        "digits": setting.digits,
        "steps": setting.steps,
        "batch": setting.batch,
        "arms": list(arms.values()),
        "pairs": [
            _pair(one, other, found)
            for (one, other), found in zip(setting.pairs, _compared(setting, runs), strict=True)
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


def wanted(setting: Setting, runs: Sequence[Run]) -> list[tuple[str, float]]:
    """The arms, and the rates of others, at which a verdict waits for runs or rests on them."""
    return equal_rate.wanted(_compared(setting, runs))


def _compared(setting: Setting, runs: Sequence[Run]) -> list[Comparison]:
    found = [
        equal_rate.Run(run["arm"], run["rate"], run["seed"], run["status"], run.get("test"))
        for arm in setting.arms
        for run in _of(setting, arm, runs)
    ]
    chosen = {arm.name: choose(setting, arm, runs) for arm in setting.arms}
    ledger = equal_rate.Ledger(found, chosen, range(setting.seeds))
    return ledger.pairs([(one.name, other.name) for one, other in setting.pairs], confidence=CONFIDENCE)


def _pair(one: Arm, other: Arm, found: Comparison) -> dict[str, Any]:
    return {
        "candidate": one.words,
        "against": other.words,
        "verdict": str(found.verdict),
        "at_chosen_rates": _at_chosen_rates(found),
        "equal_rate": equal_rate.plain(found.equal_rate),
        "mean": found.mean,
        "relative": found.relative,
        "low": None if found.interval is None else found.interval.low,
        "high": None if found.interval is None else found.interval.high,
        "confidence": None if found.interval is None else found.interval.confidence,
        "detectable": found.detectable,
        "differences": found.differences,
        "seeds": found.seeds,
    }


def _at_chosen_rates(found: Comparison) -> str:
    """The verdict before it was held against one rate."""
    if found.equal_rate is None or found.mean is None:
        return str(found.verdict)
    return str(Verdict.BETTER if found.mean < 0 else Verdict.WORSE)


def _of(setting: Setting, arm: Arm, runs: Sequence[Run]) -> list[Run]:
    return [run for run in runs if (run["task"], run["arm"], run["steps"]) == (setting.name, arm.name, setting.steps)]
