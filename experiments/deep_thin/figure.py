"""The paired differences of all tasks as one self-contained SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

WIDTH, LEFT, RIGHT, ROW, TOP = 860, 470, 30, 20, 46


def draw(results: Sequence[Mapping[str, Any]]) -> str:
    """Each comparison's mean difference and interval, in % of what it is measured against; left of 0 is better.

    Every task has a scale of its own, which stands beside its name.
    """
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts, y = [], TOP
    for result in results:
        pairs = [pair for pair in result["pairs"] if pair["relative"]]
        reach = max([abs(end) for pair in pairs for end in _ends(pair)], default=1.0)
        decimals = 0 if reach >= 10 else 1
        parts.append(f'<text x="10" y="{y + 4}" font-weight="bold">{escape(result["title"])}</text>')
        for side, anchor in ((-1, "start"), (1, "end")):
            x = middle + side * (WIDTH - LEFT - RIGHT) / 2
            label = f"{side * reach:+.{decimals}f} %"
            parts.append(f'<text x="{x:.0f}" y="{y + 4}" text-anchor="{anchor}" fill="#777">{label}</text>')
        for pair in pairs:
            y += ROW
            parts += _row(pair, y, middle, (WIDTH - LEFT - RIGHT) / 2 / reach)
        y += ROW + 6
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" width="{WIDTH}" height="{y}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{WIDTH}" height="{y}" fill="#fff"/>',
        f'<text x="10" y="20" font-weight="bold">{escape("Difference in % of the arm measured against")}</text>',
        f'<text x="{middle - 8:.0f}" y="20" text-anchor="end" fill="#555">better</text>',
        f'<text x="{middle + 8:.0f}" y="20" fill="#555">worse</text>',
        f'<path d="M{middle:.1f} 10V{y - 10}" stroke="#999"/>',
    ]
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


def _row(pair: Mapping[str, Any], y: int, middle: float, per_percent: float) -> list[str]:
    low, high = _ends(pair)
    colour = "#1a7f37" if high < 0 else "#b3261e" if low > 0 else "#666"
    words = f"{_short(pair['candidate'])} against {_short(pair['against'])}"
    start, dot, end = (middle + per_percent * percent for percent in (low, 100 * pair["relative"], high))
    return [
        f'<text x="22" y="{y + 4}">{escape(words)}</text>',
        f'<path d="M{start:.1f} {y}H{end:.1f}" stroke="{colour}" stroke-width="2"/>',
        f'<circle cx="{dot:.1f}" cy="{y}" r="4" fill="{colour}"/>',
    ]


def _ends(pair: Mapping[str, Any]) -> tuple[float, float]:
    percent = 100 * pair["relative"] / pair["mean"] if pair["mean"] else 0.0
    low = pair["mean"] if pair["low"] is None else pair["low"]
    high = pair["mean"] if pair["high"] is None else pair["high"]
    return percent * low, percent * high


def _short(words: str) -> str:
    return words.replace(", Pre-LN", "").replace(", ", " ")
