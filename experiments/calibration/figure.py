"""The figure: how often equal arms are called different, and how often planted effects are found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.admin.chart import Chart, Line, draw
from experiments.calibration.trials import CURVATURES, POWER, PROMISED
from experiments.calibration.worlds import ALIKE

RULE = 7
"""Colour of the line that marks what was promised."""


def draw_all(rows: Sequence[Mapping[str, Any]], pool: Mapping[str, Any] | None) -> str:
    """One SVG."""
    charts = [_alike(rows), _grid(rows), _power(rows, pool)]
    return draw([*charts, _real(pool)] if pool is not None else charts)


def _alike(rows: Sequence[Mapping[str, Any]]) -> Chart:
    worlds = [world for world in ALIKE if world != "identical"]
    lines = [
        _line(world, _select(rows, "alike", world, 4), "called", i % RULE, dashed=i >= RULE)
        for i, world in enumerate(worlds)
    ]
    return _chart(
        "Equal arms, made up: called different", "share of comparisons", [*lines, _promise(lines, PROMISED)], 0.1
    )


def _grid(rows: Sequence[Mapping[str, Any]]) -> Chart:
    lines = []
    for colour, name in enumerate(("called_before", "called")):
        for world in map(str, CURVATURES):
            found = _select(rows, "grid", world, 4)
            words = "grid of rates, " + ("now" if name == "called" else "before")
            lines.append(_line(words, found, name, (4, 2)[colour], dashed=name != "called"))
    return _chart("Equal arms with a grid of rates", "share of comparisons", [*lines, _promise(lines, PROMISED)], 0.4)


def _power(rows: Sequence[Mapping[str, Any]], pool: Mapping[str, Any] | None) -> Chart:
    found = _select(rows, "power", "normal", 4)
    lines = [
        _line("printed effect, planted", found, "printed", 0),
        _line("effect as printed before", found, "naive", 1, dashed=True),
    ]
    if pool is not None and pool["planted"]:
        lines.append(_real_line("printed effect, in real runs", pool["planted"], 3))
    return _chart("Planted effects: found", "share of comparisons", [*lines, _promise(lines, POWER, "promised")], 1.0)


def _real(pool: Mapping[str, Any]) -> Chart:
    two, four = ([row for row in pool["start"] if row["arms"] == arms] for arms in (2, 4))
    lines = [
        _real_line("real runs, 2 arms, other starts", two, 0),
        _real_line("real runs, 4 arms, other starts", four, 2),
        _real_line("real runs, 2 arms, other rounding", pool["rounding"], 5),
    ]
    return _chart(
        "Equal arms, real runs: called different", "share of comparisons", [*lines, _promise(lines, PROMISED)], 0.2
    )


def _select(rows: Sequence[Mapping[str, Any]], kind: str, world: str, arms: int) -> list[Mapping[str, Any]]:
    found = [row for row in rows if (row["kind"], row["world"], row["arms"]) == (kind, world, arms)]
    return sorted(found, key=lambda row: row["seeds"])


def _line(name: str, rows: Sequence[Mapping[str, Any]], what: str, colour: int, *, dashed: bool = False) -> Line:
    rates = [row["rates"][what] for row in rows]
    return Line(
        name,
        [row["seeds"] for row in rows],
        [rate["rate"] for rate in rates],
        colour,
        dashed=dashed,
        dots=True,
        low=[rate["low"] for rate in rates],
        high=[rate["high"] for rate in rates],
    )


def _real_line(name: str, rows: Sequence[Mapping[str, Any]], colour: int) -> Line:
    across, up = [row["n"] for row in rows], [row["rate"] for row in rows]
    low, high = [row["low"] for row in rows], [row["high"] for row in rows]
    return Line(name, across, up, colour, dots=True, low=low, high=high)


def _promise(lines: Sequence[Line], value: float, name: str = "promised at most") -> Line:
    across = sorted({x for line in lines for x in line.across})
    return Line(name, [across[0], across[-1]], [value, value], RULE, dashed=True, listed=name == "promised")


def _chart(title: str, up: str, lines: Sequence[Line], top: float) -> Chart:
    return Chart(title, "seeds", up, lines, limits=(0.0, top))
