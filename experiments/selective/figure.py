"""Two figures: attention on the target by length (arithmetic, and trained), and the passkey by length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.running import mean_half
from experiments.selective import dilution, passkey, theory
from experiments.selective.arms import FIVE


def dilution_figure(results: Mapping[str, Any]) -> str:
    """The needle's weight at fixed scores; the target's weight in the trained layer; right answers there."""
    charts = []
    if "theory" in results:
        charts.append(_needle(results["theory"]["found"]))
    if "dilution" in results:
        runs = results["dilution"]["found"]["runs"]
        for name, words in (("target", "target's weight"), ("accuracy", "right answers")):
            lines = by_length(runs, "", dilution.LENGTHS, name, FIVE)
            charts.append(Chart(f"Trained at 8 to 64 keys: {words}", "keys", words, lines, True, limits=(0.0, 1.02)))
    return draw(charts)


def passkey_figure(results: Mapping[str, Any]) -> str:
    """Right answers by length, a chart for each setting."""
    runs = results["passkey"]["found"]["runs"]
    charts = []
    for setting, about in passkey.SETTINGS.items():
        lines = by_length(runs, setting, passkey.LENGTHS, "accuracy", FIVE)
        if lines:
            title = f"Passkey, {about.words}"
            charts.append(Chart(title, "tokens", "right answers", lines, True, limits=(0.0, 1.02)))
    return draw(charts)


def by_length(
    runs: Sequence[Mapping[str, Any]], setting: str, lengths: Sequence[int], name: str, arms: Sequence[str]
) -> list[Line]:
    """A line for each arm with its interval over seeds."""
    lines = []
    for colour, arm in enumerate(arms):
        own = [r for r in runs if (r["arm"], r["setting"], r["status"]) == (arm, setting, "finished")]
        if not own:
            continue
        pairs = [mean_half([run["lengths"][str(n)][name] for run in own]) for n in lengths]
        low = [max(0.0, mean - (half or 0.0)) for mean, half in pairs]
        high = [min(1.0, mean + (half or 0.0)) for mean, half in pairs]
        lines.append(Line(arm, lengths, [mean for mean, _ in pairs], colour, dots=True, low=low, high=high))
    return lines


def _needle(rows: Sequence[Mapping[str, Any]]) -> Chart:
    lines = []
    for colour, slope in enumerate(theory.SLOPES[:3]):  # the last one stays at 1
        own = [row for row in rows if (row["kind"], row["slope"]) == ("needle", slope)]
        name = f"slope × score = {slope * theory.SCORE:g}"
        at = [row["n"] for row in own]
        lines.append(Line(name, at, [row["max_weight"] for row in own], 7 - colour, dashed=True, dots=True))
    title = f"Fixed scores: a needle {theory.SCORE:g} above the rest"
    return Chart(title, "keys", "its weight", lines, True, limits=(0.0, 1.02))


def draw_all(results: Mapping[str, Any]) -> dict[str, str]:
    """By file name."""
    found = {}
    if "theory" in results or "dilution" in results:
        found["dilution.svg"] = dilution_figure(results)
    if "passkey" in results:
        found["passkey.svg"] = passkey_figure(results)
    return found
