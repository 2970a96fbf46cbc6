"""Line charts as one self-contained SVG, linear or logarithmic axes, readable on a light and on a dark page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#1f5fa8", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be185d", "#0e7490", "#525252")
WIDE, HIGH = 330, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 30, 40
LEGEND_ROW = 15
CHARACTER = 8
"""Room for a digit at the size of the ticks (about 7) in any usual sans-serif: the reader's font is not known here."""


@dataclass(frozen=True)
class Line:
    """Points that are joined; `dashed` for what is predicted, `dots` to mark each."""

    name: str
    across: Sequence[float]
    up: Sequence[float]
    colour: int
    dashed: bool = False
    dots: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    """A band about the line, such as an interval."""
    listed: bool = True
    """Whether the legend names it."""


@dataclass(frozen=True)
class Chart:
    """One pair of axes."""

    title: str
    across: str
    up: str
    lines: Sequence[Line]
    log_across: bool = False
    log_up: bool = False
    limits: tuple[float, float] | None = None
    """Of the upward axis; None = from the data."""


def draw(charts: Sequence[Chart], *, columns: int = 2) -> str:
    """Return an SVG with the charts in rows of `columns`, and one legend of all names below."""
    columns = min(columns, len(charts))
    cell_wide, cell_high = LEFT + WIDE + RIGHT, TOP + HIGH + BOTTOM
    names: dict[str, Line] = {}
    for chart in charts:
        for line in chart.lines:
            if line.listed:
                names.setdefault(line.name, line)
    rows = math.ceil(len(charts) / columns)
    per_row = max(1, columns * cell_wide // 240)
    # A label stands centred under its tick, so one at the right end of the last column needs room beyond the frame.
    width = columns * cell_wide + max(0, math.ceil(max(_beyond(c) for c in charts[columns - 1 :: columns])) - RIGHT)
    height = rows * cell_high + LEGEND_ROW * math.ceil(len(names) / per_row) + 12
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for index, chart in enumerate(charts):
        x, y = (index % columns) * cell_wide + LEFT, (index // columns) * cell_high + TOP
        parts.append(f'<g transform="translate({x},{y})">{_chart(chart)}</g>')
    listed = sorted(names.items(), key=lambda item: item[1].dashed)
    for index, (name, line) in enumerate(listed):
        x, y = LEFT + (index % per_row) * 240, rows * cell_high + LEGEND_ROW * (index // per_row) + 6
        parts.append(f'<path d="M{x} {y}h22" {_stroke(line)}/><text x="{x + 28}" y="{y + 4}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _beyond(chart: Chart) -> float:
    """How far the labels of the axis across reach to the right of the frame."""
    axis = _across(chart)
    return max((axis.place(tick) + CHARACTER * len(words) / 2 - WIDE for tick, words in axis.ticks()), default=0.0)


def _across(chart: Chart) -> _Axis:
    xs = [x for line in chart.lines for x in line.across]
    return _Axis(min(xs), max(xs), chart.log_across, WIDE)


def _chart(chart: Chart) -> str:
    ys = [y for line in chart.lines for series in (line.up, line.low, line.high) for y in series or ()]
    ys = [y for y in ys if math.isfinite(y) and (y > 0 or not chart.log_up)]
    low, high = chart.limits or (min(ys), max(ys))
    x_axis = _across(chart)
    y_axis = _Axis(low, high, chart.log_up, HIGH, padded=chart.limits is None)
    parts = [f'<text y="-12" font-weight="bold">{escape(chart.title)}</text>']
    for tick, words in x_axis.ticks():
        x = x_axis.place(tick)
        parts.append(f'<path d="M{x:.1f} 0V{HIGH}" stroke="#eee"/>')
        parts.append(f'<text x="{x:.1f}" y="{HIGH + 14}" text-anchor="middle" fill="#555">{words}</text>')
    for tick, words in y_axis.ticks():
        y = HIGH - y_axis.place(tick)
        parts.append(f'<path d="M0 {y:.1f}H{WIDE}" stroke="#eee"/>')
        parts.append(f'<text x="-5" y="{y + 4:.1f}" text-anchor="end" fill="#555">{words}</text>')
    for line in chart.lines:
        parts += _line(line, x_axis, y_axis)
    parts.append(f'<rect width="{WIDE}" height="{HIGH}" fill="none" stroke="#999"/>')
    parts.append(f'<text x="{WIDE / 2}" y="{HIGH + 30}" text-anchor="middle" fill="#555">{escape(chart.across)}</text>')
    parts.append(
        f'<text transform="translate(-40,{HIGH / 2}) rotate(-90)" text-anchor="middle" fill="#555">'
        f"{escape(chart.up)}</text>"
    )
    return "".join(parts)


def _line(line: Line, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    def points(values: Sequence[float]) -> list[str]:
        shown = [(x, y) for x, y in zip(line.across, values, strict=True) if y_axis.shows(y)]
        return [f"{x_axis.place(x):.1f} {HIGH - y_axis.place(y):.1f}" for x, y in shown]

    parts = []
    if line.low is not None and line.high is not None:
        low = [max(value, y_axis.low) for value in line.low]
        around = "L".join(points(list(line.high)) + points(low)[::-1])
        parts.append(f'<path d="M{around}Z" fill="{COLOURS[line.colour]}" fill-opacity=".15"/>')
    middle = points(line.up)
    parts.append(f'<path d="M{"L".join(middle)}" {_stroke(line)}/>')
    if line.dots:
        dots = "".join(f"M{point}h0" for point in middle)
        parts.append(f'<path d="{dots}" stroke="{COLOURS[line.colour]}" stroke-width="5" stroke-linecap="round"/>')
    return parts


def _stroke(line: Line) -> str:
    dash = ' stroke-dasharray="5 3"' if line.dashed else ""
    return f'fill="none" stroke="{COLOURS[line.colour]}" stroke-width="1.6"{dash}'


class _Axis:
    """From values to places between 0 and `size`; values beyond the ends are put at them."""

    def __init__(self, low: float, high: float, log: bool, size: float, *, padded: bool = False) -> None:
        self.log, self.size = log, size
        a, b = self._stretch(low), self._stretch(high)
        room = (b - a or 1.0) * (0.05 if padded else 0.0)
        self._a, self._b = a - room, (b if b > a else a + 1.0) + room
        self.low = math.exp(self._a) if log else self._a

    def _stretch(self, value: float) -> float:
        return math.log(value) if self.log else value

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log)

    def place(self, value: float) -> float:
        share = (self._stretch(value) - self._a) / (self._b - self._a)
        return self.size * min(1.0, max(0.0, share))

    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the axis and how they are written."""
        if self.log:
            first, last = math.floor(self._a / math.log(10)), math.ceil(self._b / math.log(10))
            digits = (1, 2, 5) if last - first < 4 else (1,)
            found = [digit * 10.0**power for power in range(first, last + 1) for digit in digits]
            within = [value for value in found if self._a <= math.log(value) <= self._b]
            return [(value, f"{value:g}" if value >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")) for value in within]
        step = 10 ** math.floor(math.log10(self._b - self._a))
        step = next(step * part for part in (1, 0.5, 0.2, 0.1) if (self._b - self._a) / (step * part) >= 3.5)
        first = math.ceil(self._a / step - 1e-9)
        count = math.floor((self._b + step * 1e-9) / step) - first + 1
        return [((first + i) * step, f"{(first + i) * step:.6g}") for i in range(count)]
