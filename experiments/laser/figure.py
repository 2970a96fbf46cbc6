"""The figures of the README."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.laser import prefix_max, saturation, two_tokens

Runs = Sequence[Mapping[str, Any]]


def figures(law: Runs, rescued: Runs, rows: Runs, compared: Mapping[str, Any] | None) -> dict[str, str]:
    """File name -> SVG, of the parts that there are."""
    found = {}
    if any(run["kind"] == "law" for run in law):
        found["two_tokens.svg"] = _two_tokens([run for run in law if run["kind"] == "law"])
    if rescued:
        found["saturation.svg"] = _saturation(rescued)
    if any(row["by_length"] for row in rows):
        found["prefix_max.svg"] = _prefix_max(rows)
    if compared is not None and any(arm["bits"] for arm in compared["arms"]):
        found["text.svg"] = _text(compared)
    return found


def _two_tokens(laws: Runs) -> str:
    """The ratio against the weight, and the border of the region in which LASER's gradient is the smaller one."""
    lines = [Line("equal", [1e-6, 1.0], [1.0, 1.0], 7, dashed=True)]
    lines += [Line(f"D = {run['value']:g}", run["a"], run["ratio"], colour) for colour, run in enumerate(laws)]
    across = [0.05 + 0.1 * i for i in range(120)]
    formula = [two_tokens.crossover(distance) for distance in across]
    ones = [1.0] * len(across)
    region = Line("LASER's gradient is smaller", across, formula, 4, low=formula, high=ones)
    measured = [
        Line(f"D = {run['value']:g}", [run["value"]], [run["crossover"]], colour, dots=True)
        for colour, run in enumerate(laws)
    ]
    return draw(
        [
            Chart(
                "LASER's dO/dS over softmax's, two tokens", "weight a of the larger value", "ratio", lines,
                log_across=True, log_up=True,
            ),
            Chart("Where LASER's gradient is smaller", "D = v1 - v2", "weight a", [region, *measured], limits=(0, 1)),
        ]
    )  # fmt: skip


def _saturation(rescued: Runs) -> str:
    """Steps by gap, one chart for each optimizer at the method's best rate; what was not reached has no point."""
    charts = []
    for optimizer, title in (("descent", "Plain descent, best rate"), ("adam", "Adam, best rate")):
        lines = []
        by_method = {run["method"]: run for run in rescued if run["optimizer"] == optimizer}
        names = [("softmax", 1.0), *(("LASER", value) for value in saturation.VALUES), ("self_adjust product", 1.0)]
        for colour, (method, value) in enumerate(names):
            if method not in by_method:
                continue
            steps = [saturation.steps_of(dict(by_method[method]), gap, value, None) for gap in saturation.GAPS]
            shown = [(gap, max(step, 1)) for gap, step in zip(saturation.GAPS, steps, strict=True) if step is not None]
            if shown:
                gaps, counts = zip(*shown, strict=True)
                name = f"LASER, v = {value:g}" if method == "LASER" else f"{method}, any v"
                lines.append(Line(name, list(gaps), list(counts), colour, dots=True))
        if lines:
            charts.append(Chart(title, "gap g", "steps", lines, log_up=True))
    return draw(charts)


def _prefix_max(rows: Runs) -> str:
    """Means over seeds, in a band from the lowest to the highest."""
    lines = []
    for colour, row in enumerate(row for row in rows if row["by_length"]):
        ranges = [row["range_by_length"][str(tokens)] for tokens in prefix_max.LENGTHS]
        lines.append(
            Line(
                row["arm"], list(prefix_max.LENGTHS), [row["by_length"][str(t)][0] for t in prefix_max.LENGTHS],
                colour % 8, dots=True, dashed=row["arm"].startswith("softmax"),
                low=[low for low, _ in ranges], high=[high for _, high in ranges],
            )
        )  # fmt: skip
    title = f"Prefix maximum, trained on {prefix_max.TOKENS} tokens"
    return draw([Chart(title, "tokens", "mean squared error", lines, log_across=True, log_up=True)])


def _text(compared: Mapping[str, Any]) -> str:
    """Validation by tokens; the later part alone, since the arms lie close."""
    lines, later = [], []
    for colour, arm in enumerate(compared["arms"]):
        if not arm["bits"]:
            continue
        mean = [sum(values) / len(values) for values in zip(*arm["bits"], strict=True)]
        dashed = arm["name"].startswith("softmax")
        lines.append(Line(arm["name"], arm["tokens"], mean, colour, dashed=dashed))
        half = len(mean) // 2
        later.append(Line(arm["name"], arm["tokens"][half:], mean[half:], colour, dashed=dashed))
    return draw(
        [
            Chart("Validation", "tokens read", "bits per byte", lines),
            Chart("Validation, second half", "tokens read", "bits per byte", later),
        ]
    )
