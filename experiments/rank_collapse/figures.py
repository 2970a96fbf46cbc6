"""The figures of the README, from what report.results gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.rank_collapse import initial, training

Runs = Sequence[Mapping[str, Any]]


def figures(found: Mapping[str, Any]) -> dict[str, str]:
    """File name -> SVG."""
    return {
        "correlation.svg": _correlation_figure(found["depth"]),
        "scores.svg": _score_figure(found["scores"]),
        "training.svg": _training_figure(found["training"]),
    }


def _correlation_figure(rows: Runs) -> str:
    """1 - correlation at the greater depth that all arms have, without and with dropout."""
    charts = []
    for dropout in initial.DROPOUTS:
        lines = []
        for colour, arm in enumerate(initial.ARMS):
            own = [row for row in rows if row["arm"] == arm and row["dropout"] == dropout]
            shared = [
                row for row in own if row["layers"] == max(r["layers"] for r in rows if r["arm"] == "Xavier, Pre-LN")
            ]
            for row in shared:
                across = list(range(len(row["measured"])))
                lines += [
                    Line(
                        arm,
                        across,
                        [1 - value for value in row["measured"]],
                        colour,
                        low=[1 - value for value in row["high"]],
                        high=[1 - value for value in row["low"]],
                    ),
                    Line(
                        "predicted", across, [1 - value for value in row["predicted"]], colour, True, listed=colour == 0
                    ),
                ]
        charts.append(
            Chart(f"dropout {dropout:g}", "layer", "1 - token correlation", lines, log_up=True, limits=(1e-4, 1.0))
        )
    return draw(charts)


def _score_figure(rows: Runs) -> str:
    """Score variance and relative entropy by layer, for every strength; one arm a row."""
    charts = []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        for name, words in (("score_variance", "score variance"), ("entropy", "entropy / uniform")):
            lines = []
            for colour, strength in enumerate(initial.STRENGTHS):
                for row in rows:
                    if (row["arm"], row["strength"]) == (arm, strength):
                        measured, predicted = row[name]["by_layer"]
                        across = list(range(len(measured)))
                        lines += [
                            Line(f"score std {strength:g}", across, measured, colour),
                            Line("predicted", across, predicted, colour, True, listed=colour == 0),
                        ]
            charts.append(Chart(f"{arm}: {words}", "layer", words, lines, log_up=name == "score_variance"))
    return draw(charts)


def _training_figure(rows: Runs) -> str:
    """The worst layer by step, for both learning rates."""
    charts = []
    wanted = (
        ("correlation", "1 - largest token correlation", True),
        ("score_variance", "largest score variance", True),
        ("entropy", "smallest entropy / uniform", False),
    )
    for name, words, log in wanted:
        for lr in training.RATES:
            lines = []
            for colour, arm in enumerate(training.ARMS):
                for row in rows:
                    if (row["arm"], row["lr"]) == (arm, lr) and row["by_step"]:
                        values = row["by_step"][name]
                        shown = [max(1e-6, 1 - value) for value in values] if name == "correlation" else values
                        lines.append(Line(arm, row["steps"], shown, colour, dots=True))
            if lines:
                charts.append(Chart(f"{words}, lr {lr:g}", "step", words, lines, log_up=log))
    return draw(charts)
