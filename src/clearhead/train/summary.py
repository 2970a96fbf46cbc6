"""What `result.json` says about a run: everything that a comparison needs, computed from what was recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from clearhead.train.config import RunConfig
from clearhead.train.evaluate import EvalResult
from clearhead.train.history import History, gradient_statistics
from clearhead.train.recorder import finite


def summarize(
    *,
    config: RunConfig,
    history: History,
    curve: Sequence[Mapping[str, Any]],
    test: EvalResult | None,
    model_facts: Mapping[str, Any],
    data_facts: Mapping[str, Any],
    environment: Mapping[str, Any],
    clocks: Mapping[str, Any],
) -> dict[str, Any]:
    """Return plain values, None where the run did not get so far or a number is not finite.

    Keys (beside those of the four mappings, which are taken over as they are):

    - steps, planned_steps, tokens (positions read), valid_tokens (targets that counted), skipped_steps
    - val_bits_per_byte (the last evaluation), best_val_bits_per_byte, val_curve: a list of {step, tokens, seconds,
      cpu_seconds, bits_per_byte, loss}
    - test_bits_per_byte, test_perplexity, test_nats_per_token, test_tokens, test_bytes, test_documents: a list of
      {name, tokens, bytes, nats, bits_per_byte, perplexity}
    - grad_norm: {median, p99, max, spikes, not_finite}, over every step
    - tokens_per_second, tokens_per_cpu_second: of the median step; step_seconds, step_cpu_seconds: {median, p10, p90}
    - train_seconds, train_cpu_seconds: the steps alone, without evaluation and checkpoints. cpu_seconds count every
      thread of the process.
    """
    steps = len(history)
    bits = [point["bits_per_byte"] for point in curve if point["bits_per_byte"] is not None]
    documents = None if test is None else [_finite(document.to_dict()) for document in test.per_document]
    median, median_cpu = _median(history.column("seconds")), _median(history.column("cpu_seconds"))
    return {
        "steps": steps,
        "planned_steps": config.total_steps,
        "tokens": steps * config.tokens_per_step,
        "valid_tokens": int(history.total("valid_tokens")),
        "skipped_steps": int(history.total("skipped")),
        "val_bits_per_byte": curve[-1]["bits_per_byte"] if curve else None,
        "best_val_bits_per_byte": min(bits, default=None),
        "val_curve": [dict(point) for point in curve],
        "test_bits_per_byte": None if test is None else finite(test.bits_per_byte),
        "test_perplexity": None if test is None else finite(test.perplexity),
        "test_nats_per_token": None if test is None else finite(test.nats_per_token),
        "test_tokens": None if test is None else test.tokens,
        "test_bytes": None if test is None else test.bytes,
        "test_documents": documents,
        "grad_norm": gradient_statistics(history.column("grad_norm")),
        "tokens_per_second": config.tokens_per_step / median if median else None,
        "tokens_per_cpu_second": config.tokens_per_step / median_cpu if median_cpu else None,
        "step_seconds": _spread(history.column("seconds")),
        "step_cpu_seconds": _spread(history.column("cpu_seconds")),
        "train_seconds": history.total("seconds"),
        "train_cpu_seconds": history.total("cpu_seconds"),
        **model_facts,
        **data_facts,
        **clocks,
        "environment": dict(environment),
    }


def _median(values: np.ndarray[Any, Any]) -> float | None:
    return float(np.median(values)) if values.size else None


def _spread(values: np.ndarray[Any, Any]) -> dict[str, float | None]:
    if not values.size:
        return {"median": None, "p10": None, "p90": None}
    low, middle, high = np.quantile(values, [0.1, 0.5, 0.9])
    return {"median": float(middle), "p10": float(low), "p90": float(high)}


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {key: finite(value) for key, value in values.items()}
