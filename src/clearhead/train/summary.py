"""What `result.json` says about a run: everything that a comparison needs, computed from what was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clearhead.train.config import RunConfig
from clearhead.train.history import History, gradient_statistics


def summarize(
    *,
    config: RunConfig,
    history: History,
    curve: Sequence[Mapping[str, Any]],
    test: Mapping[str, Any],
    model_facts: Mapping[str, Any],
    data_facts: Mapping[str, Any],
    environment: Mapping[str, Any],
    clocks: Mapping[str, Any],
) -> dict[str, Any]:
    """Return plain values, None where the run did not get so far or a number is not finite.

    Keys (beside those of the five mappings, which are taken over as they are):

    - task, steps, planned_steps, tokens (positions read; of a translation the target tokens), valid_tokens (targets
      that counted), skipped_steps
    - val_loss (the last evaluation, nats per token), best_val_loss, and for a decoder val_bits_per_byte and
      best_val_bits_per_byte (of a generated task val_bits_per_answer and best_val_bits_per_answer); val_curve: a list
      of {step, tokens, seconds, cpu_seconds, loss, ...} with what the task adds: bits_per_byte (decoder), accuracy
      (masked_lm), bits_per_answer and accuracy (generated task)
    - `test`, of a decoder: test_bits_per_byte, test_perplexity, test_nats_per_token, test_tokens, test_bytes,
      test_documents: a list of {name, tokens, bytes, nats, bits_per_byte, perplexity}; for the others see
      `test_summary` in `clearhead.train.tasks`
    - grad_norm: {median, p99, max, spikes, not_finite}, over every step
    - tokens_per_second, tokens_per_cpu_second: of the median step; step_seconds, step_cpu_seconds: {median, p10, p90}
    - train_seconds, train_cpu_seconds: the steps alone, without evaluation and checkpoints. cpu_seconds count every
      thread of the process.
    """
    steps = len(history)
    scores = dict.fromkeys((config.score, "loss"))
    validation: dict[str, Any] = {}
    for name in scores:
        values = [point[name] for point in curve if point[name] is not None]
        validation[f"val_{name}"] = curve[-1][name] if curve else None
        validation[f"best_val_{name}"] = min(values, default=None)
    median, median_cpu = _median(history.column("seconds")), _median(history.column("cpu_seconds"))
    per_step = tokens_read(config, history) / steps if steps else 0.0
    return {
        "task": config.task,
        "steps": steps,
        "planned_steps": config.total_steps,
        "tokens": tokens_read(config, history),
        "valid_tokens": int(history.total("valid_tokens")),
        "skipped_steps": int(history.total("skipped")),
        **validation,
        "val_curve": [dict(point) for point in curve],
        **test,
        "grad_norm": gradient_statistics(history.column("grad_norm")),
        "tokens_per_second": per_step / median if median else None,
        "tokens_per_cpu_second": per_step / median_cpu if median_cpu else None,
        "step_seconds": _spread(history.column("seconds")),
        "step_cpu_seconds": _spread(history.column("cpu_seconds")),
        "train_seconds": history.total("seconds"),
        "train_cpu_seconds": history.total("cpu_seconds"),
        **model_facts,
        **data_facts,
        **clocks,
        "environment": dict(environment),
    }


def step_tokens(config: RunConfig, valid_tokens: int) -> int:
    """Tokens that a step counts for: positions read, or of a translation, whose padding varies, the target tokens."""
    return valid_tokens if config.task == "translation" else config.tokens_per_step


def tokens_read(config: RunConfig, history: History) -> int:
    """Tokens that the steps of `history` count for together."""
    if config.task == "translation":
        return int(history.total("valid_tokens"))
    return len(history) * config.tokens_per_step


def _median(values: np.ndarray[Any, Any]) -> float | None:
    return float(np.median(values)) if values.size else None


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float | None]:
    if not values.size:
        return {"median": None, "p10": None, "p90": None}
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}
