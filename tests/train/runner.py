"""Trains in a process of its own: `python runner.py FOLDER CONFIG.json MODE`; `main` lists the modes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.data.text import Batch, TextData
from clearhead.train import checkpoint
from clearhead.train.config import RunConfig
from clearhead.train.loop import train


def uneven_batch(self: TextData, *arguments: Any) -> Batch:
    """The real batch with the first 6 * row targets of each row not counted: no two rows count alike."""
    batch = _batch(self, *arguments)
    rows, tokens = batch.targets.shape
    hidden = np.arange(tokens) < 6 * np.arange(rows)[:, None]
    return Batch(batch.tokens, np.where(hidden, -100, batch.targets), batch.segments)


_batch = TextData.batch


def main(folder: Path, config: Path, mode: str) -> None:
    on_event = None
    if mode == "slow":
        on_event = lambda event: time.sleep(0.02)
    if mode == "stop-at-6" and os.environ["RANK"] == "0":  # one process is asked, and both have to stop
        on_event = lambda event: _terminate() if event["kind"] == "step" and event["step"] == 5 else None
    if mode == "uneven":
        TextData.batch = uneven_batch  # type: ignore[method-assign]
    if mode == "die-in-checkpoint":
        flush, calls = checkpoint.flush_folder, []

        def die(path: Path) -> None:
            calls.append(path)
            if len([p for p in calls if p.name.endswith(".part")]) == 2:  # the second checkpoint, before its rename
                os.kill(os.getpid(), signal.SIGKILL)
            flush(path)

        checkpoint.flush_folder = die  # type: ignore[assignment]
    values = json.loads(config.read_text())
    result = train(RunConfig.from_dict(values), folder, on_event=on_event, progress=False)
    # One write: the lines of several processes must not run into each other.
    os.write(sys.stdout.fileno(), f"{result.status} {result.reason}".strip().encode() + b"\n")


def _terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else "")
