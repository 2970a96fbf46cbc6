"""Reads a run's folder as the training room leaves it. The only file here that knows its format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.compare.verdict import Outcomes, Status

SCORES = ("bits_per_byte", "bits_per_answer")
"""What a run may be judged by: text by the first, a generated task by the second."""


@dataclass(frozen=True)
class Record:
    """What one run left: its end, its curves, what it cost. None where the run did not get that far."""

    arm: str
    seed: int
    folder: Path
    status: Status
    reason: str = ""
    learning_rate: float | None = None
    test: float | None = None
    val: float | None = None
    documents: list[dict[str, Any]] = field(default_factory=list)
    steps: int = 0
    tokens: int = 0
    wall_seconds: float | None = None
    cpu_seconds: float | None = None
    tokens_per_second: float | None = None
    peak_memory: int | None = None
    """Most memory held: the GPU's where there is one, else the process's own."""
    accuracy: float | None = None
    """Of a generated task: share of the test answers that were right."""
    skipped: int = 0
    train: dict[str, np.ndarray] = field(default_factory=dict)
    """Logged training steps: step, tokens, loss (nats per token), grad_norm."""
    evals: dict[str, np.ndarray] = field(default_factory=dict)
    """Validation during training: step, tokens, bits (per byte, or per answer)."""


def score_of(entry: Mapping[str, Any]) -> Any:
    """The value that an evaluation is judged by."""
    return next((entry[name] for name in SCORES if name in entry), None)


def load_record(folder: Path, arm: str, seed: int) -> Record:
    """Read one run folder; a folder that does not exist is a missing run."""
    result = read_json(folder / "result.json")
    crash = read_json(folder / "crash.json")
    config = read_json(folder / "config.json") or {}
    train, evals, skipped = read_metrics(folder / "metrics.jsonl")
    curves: dict[str, Any] = {"train": train, "evals": evals, "skipped": skipped}
    rate = config.get("optim", {}).get("lr")
    if result is None:
        status = Status.CRASHED if crash else Status.MISSING
        reason = str(crash["reason"]) if crash else ""
        steps, tokens = (int(train[name][-1]) if name in train else 0 for name in ("steps", "tokens"))
        return Record(arm, seed, folder, status, reason, rate, steps=steps, tokens=tokens, **curves)
    summary = result["summary"]
    score = next(name for name in SCORES if f"test_{name}" in summary)
    status, reason, test = Status(result["status"]), str(result["reason"]), _finite(summary[f"test_{score}"])
    if status is Status.FINISHED and test is None:
        status, reason = Status.DIVERGED, "the test value is not finite"
    gpu, own = summary.get("peak_gpu_memory_bytes"), summary["peak_memory_bytes"]
    return Record(
        arm,
        seed,
        folder,
        status,
        reason,
        rate,
        test=test if status is Status.FINISHED else None,
        val=_finite(summary[f"val_{score}"]),
        accuracy=_finite(summary.get("test_accuracy")),
        documents=summary.get("test_documents") or [],
        steps=int(summary["steps"]),
        tokens=int(summary["tokens"]),
        wall_seconds=_finite(summary["wall_seconds"]),
        cpu_seconds=_finite(summary["cpu_seconds"]),
        tokens_per_second=_finite(summary["tokens_per_second"]),
        peak_memory=own if gpu is None else gpu,
        **curves,
    )


def outcomes(name: str, runs: Sequence[Record]) -> Outcomes:
    """Return what a verdict reads of an arm's runs."""
    return Outcomes(
        name,
        {run.seed: run.status for run in runs},
        {run.seed: run.test for run in runs if run.status is Status.FINISHED and run.test is not None},
    )


def read_metrics(path: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], int]:
    """Read `metrics.jsonl`: the training curve, the validation curve, and how many steps were skipped."""
    train: dict[int, tuple[float, ...]] = {}
    evals: dict[int, tuple[float, ...]] = {}
    skipped = 0
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}, {}, 0
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # the half-written last line of a run that was killed
        # A resumed run may have logged a step twice; the later line counts.
        if entry.get("kind") == "eval":
            if entry.get("split") == "val":
                evals[entry["step"]] = (entry["step"], entry["tokens"], _number(score_of(entry)))
        elif "loss" in entry:
            train[entry["step"]] = (
                entry["step"],
                entry["tokens"],
                _number(entry["loss"]),
                _number(entry.get("grad_norm")),
            )
            skipped = max(skipped, int(entry.get("skipped") or 0))
    return (
        _columns(train, ("steps", "tokens", "loss", "grad_norm")),
        _columns(evals, ("steps", "tokens", "bits")),
        skipped,
    )


def _columns(rows: dict[int, tuple[float, ...]], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    if not rows:
        return {}
    table = np.array([rows[step] for step in sorted(rows)], dtype=float)
    return {name: table[:, i] for i, name in enumerate(names)}


def read_json(path: Path) -> dict[str, Any] | None:
    """Read a JSON object; None for a file that is not there or holds something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else math.nan


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
