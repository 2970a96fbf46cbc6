"""Tables and the figure, from the runs alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clearhead.compare.verdict import Outcomes, Status, compare_outcomes
from experiments.admin.chart import Chart, Line, draw
from experiments.long_memory import recall as task
from experiments.long_memory import text as reading
from experiments.long_memory.task import BUCKETS, REACH
from experiments.running import mean_half

Runs = Sequence[Mapping[str, Any]]
LEARNED = 0.9
"""Accuracy over `EVERY` steps of training from which a run counts as having learned."""


def said(pair: Sequence[float | None], digits: int = 2) -> str:
    """Mean and half of the interval as text."""
    mean, half = pair
    assert mean is not None
    return f"{mean:.{digits}f}" if half is None else f"{mean:.{digits}f} ± {half:.{digits}f}"


# ---- (a) and (b) two-step recall ----


def recall(runs: Runs) -> dict[str, Any]:
    """Accuracy by distance, mean and interval over seeds, and the step from which a run answers."""
    rows = []
    for layers, layouts in task.LAYOUTS.items():
        for span in ("window", "memory"):
            for layout in layouts:
                own = [run for run in runs if (run["layers"], run["layout"], run["range"]) == (layers, layout, span)]
                own = sorted(own, key=lambda run: run["seed"])
                if not own:
                    continue
                rows.append(
                    {
                        "layers": layers,
                        "range": span,
                        "layout": layout,
                        "memory": own[0]["memory"],
                        "bytes_per_stream": own[0]["bytes_per_stream"],
                        "seeds": len(own),
                        "steps": own[0]["steps"],
                        "accuracy": [mean_half([run["accuracy"][i] for run in own]) for i in range(len(BUCKETS))],
                        "learned_at": [
                            next((step for step, right in run["curve"] if right >= LEARNED), None) for run in own
                        ],
                        "curves": [run["curve"] for run in own],
                        "cpu_seconds": round(sum(run["cpu_seconds"] for run in own)),
                    }
                )
    asked = [sum(run["asked"][i] for run in runs) for i in range(len(BUCKETS))]
    return {"rows": rows, "asked_of_all_runs": asked}


def recall_table(found: Mapping[str, Any]) -> list[str]:
    """One row for each layout and range."""
    heads = [f"{low} to {high - 1}" for low, high in BUCKETS]
    lines = [
        "| layers | range | layout | KiB a stream | seeds | " + " | ".join(heads) + " | learned at step |",
        "|---|---|---|---|---|" + "---|" * (len(heads) + 1),
    ]
    for row in found["rows"]:
        steps = ", ".join("never" if step is None else str(step) for step in row["learned_at"])
        cells = " | ".join(said(pair) for pair in row["accuracy"])
        kib = f"{row['bytes_per_stream'] / 1024:.0f}"
        lines.append(
            f"| {row['layers']} | {row['range']} | {row['layout']} | {kib} | {row['seeds']} | {cells} | {steps} |"
        )
    return lines


def figure(found: Mapping[str, Any]) -> str:
    """Accuracy by distance of the two-layer models, a chart for each range."""
    charts = []
    middles = [(low + min(high, REACH)) / 2 for low, high in BUCKETS]
    for span in ("window", "memory"):
        lines = []
        for colour, layout in enumerate(task.LAYOUTS[2]):
            for row in found["rows"]:
                if (row["layers"], row["range"], row["layout"]) != (2, span, layout):
                    continue
                means = [mean for mean, _ in row["accuracy"]]
                halves = [half or 0.0 for _, half in row["accuracy"]]
                low = [m - h for m, h in zip(means, halves, strict=True)]
                high = [m + h for m, h in zip(means, halves, strict=True)]
                lines.append(Line(layout, middles, means, colour, dots=True, low=low, high=high))
        if lines:
            title = f"two layers, range={span}"
            charts.append(Chart(title, "tokens from value to query", "right answers", lines, True, limits=(0.0, 1.02)))
    return draw(charts)


# ---- (c) text ----


def text(runs: Runs) -> dict[str, Any]:
    """Bits per byte by arm, and each arm against the full memory."""
    rows = []
    for arm in reading.ARMS:
        own = sorted((run for run in runs if run["arm"] == arm), key=lambda run: run["seed"])
        values = [run["test"] for run in own if run["test"] is not None]
        if not values:
            continue
        rows.append(
            {
                "arm": arm,
                "memory": own[0]["memory"],
                "bytes_per_stream": own[0]["bytes_per_stream"],
                "parameters": own[0]["parameters"],
                "tokens": own[0]["tokens"],
                "seeds": len(own),
                "test": mean_half(values),
                "by_seed": values,
                "cpu_seconds": round(sum(run["cpu_seconds"] for run in own)),
            }
        )
    outcomes = {arm: _outcomes(runs, arm) for arm in reading.ARMS}
    verdicts = []
    if all(len(one.values) > 1 for one in outcomes.values()):
        others = [one for one in outcomes.values() if one.name != reading.BASELINE]
        for one, judged in zip(others, compare_outcomes(outcomes[reading.BASELINE], others), strict=True):
            verdicts.append({"arm": one.name, "verdict": str(judged.verdict), "sentence": judged.sentence})
    return {"rows": rows, "verdicts": verdicts}


def _outcomes(runs: Runs, arm: str) -> Outcomes:
    own = [run for run in runs if run["arm"] == arm]
    return Outcomes(
        arm,
        {run["seed"]: Status(run["status"]) for run in own},
        {run["seed"]: run["test"] for run in own if run["test"] is not None},
    )


def text_table(found: Mapping[str, Any]) -> list[str]:
    """One row for each arm, then the verdicts."""
    lines = [
        "| arm | memory | KiB a stream | parameters | seeds | test bits per byte |",
        "|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        lines.append(
            f"| {row['arm']} | `{row['memory']}` | {row['bytes_per_stream'] / 1024:.0f} | {row['parameters']:,} "
            f"| {row['seeds']} | {said(row['test'], 4)} |"
        )
    return [*lines, "", *(f"- {verdict['sentence']}" for verdict in found["verdicts"])]


TABLES = {"recall": recall_table, "text": text_table}


def page(results: Mapping[str, Any]) -> list[str]:
    """What stands between the README's marks."""
    lines = []
    if "recall" in results:
        lines += [
            "### (a), (b) Two-step recall: share of right answers by distance from the value to its query",
            "",
            "![accuracy by distance](results/recall.svg)",
            "",
            *recall_table(results["recall"]),
            "",
        ]
    if "text" in results:
        lines += ["### (c) Text", "", *text_table(results["text"])]
    return lines
