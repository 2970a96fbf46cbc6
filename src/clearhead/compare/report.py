"""Writes `report.html`, `results.json` and `results.csv` from the run folders, as often as one likes.

The page is one file; `clearhead._page` says how such pages are made. Each number on it names its path
in `results.json`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clearhead import _page
from clearhead._page import DASHES, PALETTE, SYMBOLS, embedded, write
from clearhead.compare.layout import Layout
from clearhead.compare.results import collect

MINUS = "\N{MINUS SIGN}"
BASELINE_COLOUR = ("#4d4d4f", "#c9c9c6")


def redraw(folder: Path | str) -> dict[str, Any]:
    """Rewrite the report, `results.json` and `results.csv` of a comparison's folder, finished or not.

    Returns the results. Raises `UserError` when the folder holds no comparison.
    """
    layout = Layout(Path(folder))
    results = collect(layout.folder)
    write(layout.results, json.dumps(results, indent=1, allow_nan=False) + "\n")
    write(layout.table, to_csv(results))
    write(layout.report, render(results))
    return results


def to_csv(results: Mapping[str, Any]) -> str:
    """Return one line for each run; what a run does not have is an empty cell."""
    stream = io.StringIO()
    rows = results["runs"]
    writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _signed(value: float, digits: int) -> str:
    return f"{value:+.{digits}f}".replace("-", MINUS)


def _p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _duration(value: float) -> str:
    if value < 1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.1f} s" if value < 120 else f"{value / 60:.1f} min"


def _short(value: float) -> str:
    return f"{value:.3g}"


FORMATS: dict[str, Callable[[Any], str]] = {
    "text": str,
    "bits": lambda v: f"{v:.4f}",
    "difference": lambda v: _signed(v, 4),
    "percent": lambda v: f"{v:.2%}".replace("-", MINUS),
    "signed_percent": lambda v: f"{v:+.2%}".replace("-", MINUS),
    "confidence": lambda v: f"{v * 100:.3g}%",
    "integer": lambda v: f"{v:,.0f}",
    "ratio": lambda v: f"{v:.3f}×",
    "ratio4": lambda v: f"{v:.4f}×",
    "p": _p_value,
    "duration": _duration,
    "megabytes": lambda v: f"{v / 1e6:,.0f} MB",
    "gigabytes": lambda v: f"{v / 2**30:.1f} GiB",
    "mega": lambda v: f"{v / 1e6:.3f} M",
    "short": _short,
    "loads": lambda v: ", ".join(f"{x:.2f}" for x in v),
    "list": lambda v: ", ".join(map(str, v)),
}


class Figures(_page.Figures):
    """Numbers of `results.json`, in this report's formats."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        super().__init__(results, FORMATS)


def render(results: Mapping[str, Any]) -> str:
    """Return the page."""
    figures = Figures(results)
    return _page.render(
        "compare/report.html.j2",
        results=results,
        figure=figures.figure,
        value=figures.value,
        styles=arm_styles(results),
        data=embedded({k: results[k] for k in ("arms", "tuning", "unit")}),
        plain_value=plain_value,
    )


def arm_styles(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return colour, dash and symbol of each arm: told apart without colour too."""
    styles, candidate = [], 0
    for arm in results["arms"]:
        if arm["baseline"]:
            light, dark = BASELINE_COLOUR
            styles.append({"light": light, "dark": dark, "dash": "solid", "symbol": "circle-open"})
            continue
        light, dark = PALETTE[candidate % len(PALETTE)]
        dash = DASHES[(candidate + candidate // len(PALETTE)) % len(DASHES)]
        styles.append({"light": light, "dark": dark, "dash": dash, "symbol": SYMBOLS[candidate % len(SYMBOLS)]})
        candidate += 1
    return styles


def plain_value(value: Any) -> str:
    """Print a configuration value as it would be typed."""
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, list):
        return ",".join(map(str, value))
    return str(value)
