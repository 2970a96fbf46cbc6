"""Small scatter plots as one self-contained SVG, readable on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

Stretch = Callable[[float], float]


@dataclass(frozen=True)
class Panel:
    """One scatter plot."""

    title: str
    caption: str
    across: Sequence[float]
    up: Sequence[float]
    ratio: bool
    """Ratios (a correlation) have a linear axis that holds 0 and 1; sizes have a logarithmic one."""


SIDE = 150
GAP = 26
TOP = 34
BOTTOM = 20
PER_ROW = 5
EMPTY = 1e-12


def scatter_row(panels: Sequence[Panel]) -> str:
    """Return an SVG with one panel per quantity, at most five in a row."""
    columns = min(PER_ROW, len(panels))
    rows = math.ceil(len(panels) / PER_ROW)
    width, height = columns * (SIDE + GAP) + GAP, rows * (SIDE + TOP + BOTTOM) + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, panel in enumerate(panels):
        left = GAP + (index % PER_ROW) * (SIDE + GAP)
        top = TOP + (index // PER_ROW) * (SIDE + TOP + BOTTOM)
        parts.append(f'<g transform="translate({left},{top})">{_panel(panel)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel) -> str:
    values = [*panel.across, *panel.up]
    low, high, stretch = _linear(values) if panel.ratio else _logarithmic(values)
    span = max(stretch(high) - stretch(low), EMPTY)

    def place(value: float) -> float:
        return SIDE * (0.04 + 0.92 * (stretch(value) - stretch(low)) / span)

    dots = "".join(f"M{place(a):.1f} {SIDE - place(b):.1f}h0" for a, b in zip(panel.across, panel.up))
    return (
        f'<rect width="{SIDE}" height="{SIDE}" fill="none" stroke="#999"/>'
        f'<path d="M0 {SIDE}L{SIDE} 0" stroke="#bbb"/>'
        f'<path d="{dots}" stroke="#1f5fa8" stroke-opacity=".55" stroke-width="4" stroke-linecap="round"/>'
        f'<text y="-19" font-weight="bold">{escape(panel.title)}</text>'
        f'<text y="-6" fill="#555">{escape(panel.caption)}</text>'
        f'<text y="{SIDE + 13}" fill="#555">{low:.2g}</text>'
        f'<text x="{SIDE}" y="{SIDE + 13}" fill="#555" text-anchor="end">{high:.2g}</text>'
    )


def _linear(values: Sequence[float]) -> tuple[float, float, Stretch]:
    return min(0.0, *values), max(1.0, *values), lambda value: value


def _logarithmic(values: Sequence[float]) -> tuple[float, float, Stretch]:
    # Linear around 0, should a size be 0 or below.
    sizes = sorted(abs(value) for value in values if abs(value) > EMPTY)
    bend = sizes[0] if sizes else 1.0
    return min(values), max(values), lambda value: math.asinh(value / bend)
