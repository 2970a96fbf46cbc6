"""The figure: accuracy by steps since the last set, and validation curves by tokens and by time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.feedback.task import BANDS, band_names


def draw_all(rows: Sequence[dict[str, Any]], compared: dict[str, Any] | None) -> str:
    """One SVG."""
    charts = []
    for steps in sorted({row["steps"] for row in rows}, reverse=True):
        lines = [_accuracy(row, colour) for colour, row in enumerate(rows) if row["steps"] == steps]
        charts.append(
            Chart(
                f"State tracking, {steps} steps",
                "tokens since the last set",
                "accuracy",
                lines,
                log_across=True,
                limits=(0.0, 1.0),
            )
        )
    if compared is not None:
        charts += [_text(compared, by_time=False), _text(compared, by_time=True)]
    return draw(charts)


def _accuracy(row: dict[str, Any], colour: int) -> Line:
    bands = [row["bands"][name] for name in band_names()]
    half = [band["half"] or 0.0 for band in bands]
    up = [band["mean"] for band in bands]
    return Line(
        row["model"].replace(", memory = ", ": "),
        [low + 1 for low, _ in BANDS],
        up,
        colour,
        dots=True,
        low=[max(0.0, value - h) for value, h in zip(up, half, strict=True)],
        high=[min(1.0, value + h) for value, h in zip(up, half, strict=True)],
    )


def _text(compared: dict[str, Any], *, by_time: bool) -> Chart:
    lines = []
    for colour, arm in enumerate(compared["arms"]):
        speed = arm["speed"]
        scale = speed["median_seconds"] / speed["tokens_per_step"] if by_time else 1.0
        mean = [sum(values) / len(values) for values in zip(*arm["bits"], strict=True)]
        lines.append(Line(f"text: {arm['name']}", [t * scale for t in arm["tokens"]], mean, colour, dashed=True))
    title, across = ("by time", "seconds of one thread") if by_time else ("by tokens", "tokens read")
    return Chart(f"Validation, {title}", across, "bits per byte", lines, log_across=by_time)
