"""A masked LM through the package's own trainer, and what is kept of it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from clearhead.train.config import RunConfig
from clearhead.train.loop import train


def scores(config: RunConfig) -> dict[str, Any]:
    """Train in a passing folder; nats and accuracy on text that training never saw."""
    with tempfile.TemporaryDirectory() as folder:
        result = train(config, Path(folder) / "run", progress=False)
    found = result.summary
    return {
        "status": result.status,
        "nats": found["test_nats_per_token"],
        "accuracy": found["test_accuracy"],
        "fingerprint": found["data_fingerprint"],
        "cpu_seconds": found["cpu_seconds"],
    }
