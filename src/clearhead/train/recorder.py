"""Where a run's events go: metrics.jsonl, TensorBoard, the terminal, the caller."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from clearhead._disk import disk_errors, replace_durably
from clearhead.train.folder import METRICS

Event = dict[str, Any]


class Sink(Protocol):
    """Takes every event; `close` comes once, at the end."""

    def take(self, event: Event) -> None:
        """Use what concerns it, ignore the rest."""

    def close(self) -> None:
        """Let go of files and the terminal."""


class Recorder:
    """Hands each event to every sink, non-finite numbers as None (JSON has no NaN)."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def __call__(self, kind: str, **values: Any) -> Event:
        """Send an event and return it."""
        event = {"kind": kind} | {key: finite(value) for key, value in values.items()}
        for sink in self._sinks:
            sink.take(event)
        return event

    def close(self) -> None:
        """Close every sink, whatever one of them raises."""
        with ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)


class JsonLines:
    """`metrics.jsonl`: one line for each logged step, each evaluation and each look inside."""

    def __init__(self, run: Path, step: int, evaluated: int) -> None:
        """Go on after `step` and the evaluation at `evaluated`: later lines, and a torn last one, are removed."""
        path = run / METRICS
        last = {"train": step, "eval": evaluated, "signal": step}
        with disk_errors(METRICS, "the checkpoints are untouched"):
            replace_durably(path, b"".join(_lines_until(path, last)))
            # Unbuffered: what a full disk refused must not be tried again when the file is closed.
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def take(self, event: Event) -> None:
        """Append training, evaluation and signal lines, visible to readers at once."""
        if event["kind"] in ("train", "eval", "signal"):
            with disk_errors(METRICS, "the checkpoints are untouched"):
                rest = (json.dumps(event, allow_nan=False) + "\n").encode()
                while rest:
                    rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """`tensorboard/`: the same numbers over steps, for who likes to look there."""

    def __init__(self, run: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when asked for

        self._writer = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def take(self, event: Event) -> None:
        """Write every number of a training or evaluation line as a scalar."""
        group = {"train": "train", "eval": event.get("split", "val")}.get(event["kind"])
        if group is None:
            return
        for key, value in event.items():
            if key not in ("step", "tokens") and isinstance(value, int | float):
                self._writer.add_scalar(f"{group}/{key}", value, event["step"])

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class Terminal:
    """A bar with loss, tokens per second and time left; evaluations and warnings as lines above it."""

    def __init__(self, total: int, step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  {task.fields[speed]} tokens/s  left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._bar.add_task("training", total=total, completed=step, loss="-", speed="-")
        self._bar.start()

    def take(self, event: Event) -> None:
        """Show it."""
        kind = event["kind"]
        if kind == "step":
            loss = "not finite" if event["loss"] is None else f"{event['loss']:.4f}"
            speed = f"{event['tokens_per_second']:,.0f}" if event["tokens_per_second"] else "-"
            self._bar.update(self._task, completed=event["step"], loss=loss, speed=speed)
        elif kind == "eval":
            key = next((key for key in ("bits_per_byte", "bits_per_answer") if key in event), "loss")
            unit = "nats per token" if key == "loss" else key.replace("_", " ")
            score = "not finite" if event[key] is None else f"{event[key]:.4f} {unit}"
            score += f", {event['accuracy']:.1%} right" if "accuracy" in event else ""
            self._bar.console.print(f"step {event['step']}: validation {score}", highlight=False)
        elif kind in ("note", "warning"):
            self._bar.console.print(event["text"], highlight=False, markup=False)

    def close(self) -> None:
        """Give the terminal back."""
        self._bar.stop()


class Caller:
    """The function that the caller of `train` gave."""

    def __init__(self, function: Callable[[Event], object]) -> None:
        self._function = function

    def take(self, event: Event) -> None:
        """Hand over a copy."""
        self._function(dict(event))

    def close(self) -> None:
        """Nothing is held."""


def finite(value: Any) -> Any:
    """Return None for a float that is not finite, anything else as it is."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _lines_until(path: Path, last: dict[str, int]) -> list[bytes]:
    kept = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
        try:
            event = json.loads(line)
            keep = line.endswith(b"\n") and event["step"] <= last[event["kind"]]
        except (ValueError, KeyError, TypeError):
            continue  # torn by a crash, or not ours
        if keep:
            kept.append(line)
    return kept
