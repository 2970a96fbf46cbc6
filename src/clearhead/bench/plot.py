"""The figures of the page, as self-contained SVG that reads on a light and on a dark page. Made from records alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

PANEL_WIDE, PANEL_HIGH, LEFT, TOP, BOTTOM, LABELS = 190, 170, 34, 34, 34, 222
COLUMNS = 2
LINE = 13
TITLES = {
    "softmax": "softmax",
    "laser": "LASER",
    "temperatures": "temperatures",
    "self_adjust": "Self-Adjust",
    "window": "windows",
    "other": "others",
}
OURS = ("#1f5fa8", "#9333ea", "#be123c")
OTHERS = {
    "x-transformers": "#b45309",
    "transformers": "#15803d",
}
TICKS = (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100)


def by_length(groups: Sequence[Mapping[str, Any]], families: Sequence[str]) -> str:
    """A panel for each family: the ratio to SDPA by length, both axes logarithmic, the same scale everywhere."""
    lengths = [group["length"] for group in groups]
    ratios = [one["median_ratio"] for group in groups for one in group["results"].values()]
    scale = _Scale(min(0.9, *ratios), max(1.2, *ratios))
    shown = [family for family in families if any(_names(groups, family))]
    cell_wide, cell_high = LEFT + PANEL_WIDE + LABELS, TOP + PANEL_HIGH + BOTTOM
    rows = math.ceil(len(shown) / COLUMNS)
    parts = _head(COLUMNS * cell_wide, rows * cell_high)
    for index, family in enumerate(shown):
        x, y = (index % COLUMNS) * cell_wide + LEFT, (index // COLUMNS) * cell_high + TOP
        parts.append(f'<g transform="translate({x},{y})">{_panel(groups, family, lengths, scale)}</g>')
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """Ratios to heights, logarithmic."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = math.log(low) - 0.04, math.log(high) + 0.04

    def y(self, ratio: float) -> float:
        return PANEL_HIGH * (1 - (math.log(ratio) - self.low) / (self.high - self.low))

    def ticks(self) -> list[float]:
        found: list[float] = []
        for tick in TICKS:
            inside = self.low <= math.log(tick) <= self.high
            if inside and (not found or abs(self.y(tick) - self.y(found[-1])) >= LINE or tick == 1):
                found.append(tick)
        return found


def _names(groups: Sequence[Mapping[str, Any]], family: str) -> list[str]:
    found = {name: None for group in groups for name, one in group["results"].items() if one["family"] == family}
    return [name for name in found if name != "torch sdpa"]


def _panel(groups: Sequence[Mapping[str, Any]], family: str, lengths: Sequence[int], scale: _Scale) -> str:
    places = {length: _across(length, lengths) for length in lengths}
    parts = [f'<text y="-12" font-weight="bold" font-size="13">{escape(TITLES.get(family, family))}</text>']
    for tick in scale.ticks():
        y = scale.y(tick)
        stroke = 'stroke="#444" stroke-width="1.4"' if tick == 1 else 'stroke="#e5e5e5"'
        parts.append(f'<path d="M0 {y:.1f}H{PANEL_WIDE}" {stroke}/>')
        parts.append(f'<text x="-5" y="{y + 4:.1f}" text-anchor="end" fill="#555">{tick:g}</text>')
    for length, x in places.items():
        parts.append(f'<text x="{x:.1f}" y="{PANEL_HIGH + 15}" text-anchor="middle" fill="#555">{length}</text>')
    parts.append(f'<text x="{PANEL_WIDE / 2}" y="{PANEL_HIGH + 28}" text-anchor="middle" fill="#555">tokens</text>')
    ends: list[tuple[float, str, str, str]] = []
    own: dict[str, str] = {}  # the colours of our specs; written out, a spec keeps its colour
    for name in _names(groups, family):
        points = [
            (places[group["length"]], scale.y(group["results"][name]["median_ratio"]))
            for group in groups
            if name in group["results"]
        ]
        about = next(group["results"][name] for group in groups if name in group["results"])
        if about["source"] == "clearhead":
            own[name] = OURS[len(own) % len(OURS)]
        colour = own.get(name) or OTHERS.get(about["source"]) or own.get(about["equals"], "#525252")
        dash, weight = _dash(about["source"], name), "bold" if name in own else "normal"
        path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="1.8"{dash}/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.6" fill="{colour}"/>' for x, y in points]
        ends.append((points[-1][1], name, colour, weight))
    for y, (at, name, colour, weight) in zip(_apart([end[0] for end in sorted(ends)]), sorted(ends), strict=True):
        edge = PANEL_WIDE + 4
        parts.append(f'<path d="M{edge} {at:.1f}L{edge + 10} {y:.1f}" stroke="{colour}" stroke-width=".8"/>')
        label = f'<text x="{edge + 13}" y="{y + 4:.1f}" fill="{colour}" font-weight="{weight}">'
        parts.append(f"{label}{escape(_short(name))}</text>")
    parts.append(f'<rect width="{PANEL_WIDE}" height="{PANEL_HIGH}" fill="none" stroke="#999"/>')
    return "".join(parts)


def _across(length: int, lengths: Sequence[int]) -> float:
    low, high = math.log(min(lengths)), math.log(max(lengths))
    return PANEL_WIDE / 2 if low == high else 14 + (PANEL_WIDE - 28) * (math.log(length) - low) / (high - low)


def _dash(source: str, name: str) -> str:
    """Ours is a full line; rivals are broken, those without a fused kernel dotted."""
    if source == "clearhead":
        return ""
    slow = "no flash" in name or "eager" in name
    dash = {"written-out": "5 3", "compiled": "2 2"}.get(source, "1 3" if slow else "9 3")
    return f' stroke-dasharray="{dash}"'


def _short(name: str) -> str:
    """Names are cut to what tells them apart."""
    return name.replace("self_adjust:detach_extrema=true", "self_adjust detached").replace(
        "self_adjust:form=product", "self_adjust product"
    )


def _apart(places: Sequence[float]) -> list[float]:
    """Heights in order, moved so that no two labels stand closer than a line, within the panel where they fit."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + LINE if found else 0.0))
    limit = float(PANEL_HIGH)
    for index in reversed(range(len(found))):
        found[index] = min(found[index], limit)
        limit = found[index] - LINE
    return found


def steps(groups: Sequence[Mapping[str, Any]], families: Sequence[str]) -> str:
    """Training steps: a dot for the median ratio and a line from quartile to quartile, by model."""
    rows = [name for family in families for name in dict.fromkeys(_names(groups, family))]
    ends = [one[key] for group in groups for one in group["results"].values() for key in ("low_ratio", "high_ratio")]
    low, high = min(0.9, *ends), max(1.1, *ends)
    left, wide, row = 250, 520, 20
    height = 64 + row * len(rows)

    def x(ratio: float) -> float:
        return left + wide * (math.log(ratio / low) / math.log(high / low))

    parts = _head(left + wide + 30, height)
    for place, group in enumerate(groups):
        at = left + 250 * place
        parts.append(f'<circle cx="{at}" cy="16" r="4" fill="{OURS[place % 3]}"/>')
        parts.append(f'<text x="{at + 9}" y="20">{escape(group["on"])}</text>')
    for tick in (*TICKS, 0.8, 0.9, 1.1, 1.2, 1.3):
        if low <= tick <= high:
            stroke = 'stroke="#444" stroke-width="1.4"' if tick == 1 else 'stroke="#e5e5e5"'
            parts.append(f'<path d="M{x(tick):.1f} 34V{height - 22}" {stroke}/>')
            parts.append(f'<text x="{x(tick):.1f}" y="{height - 8}" text-anchor="middle" fill="#555">{tick:g}</text>')
    for index, name in enumerate(rows):
        y = 48 + row * index
        of = next(group["results"][name]["source"] for group in groups if name in group["results"])
        weight = ' font-weight="bold"' if of == "clearhead" else ""
        parts.append(f'<text x="{left - 12}" y="{y + 4}" text-anchor="end"{weight}>{escape(_short(name))}</text>')
        for place, group in enumerate(groups):
            one = group["results"].get(name)
            if one is None:
                continue
            down, colour = y + (place - (len(groups) - 1) / 2) * 6, OURS[place % 3]
            start, dot, end = (x(one[f"{key}_ratio"]) for key in ("low", "median", "high"))
            parts.append(f'<path d="M{start:.1f} {down:.1f}H{end:.1f}" stroke="{colour}" stroke-width="2"/>')
            parts.append(f'<circle cx="{dot:.1f}" cy="{down:.1f}" r="3.4" fill="{colour}"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _head(width: int, height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11" fill="#222">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
