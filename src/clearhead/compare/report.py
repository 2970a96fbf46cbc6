"""Writes `report.html`, `results.json` and `results.csv` from the run folders, as often as one likes.

The page is one file: plotly.js and all figures are inside, nothing is fetched. Each number on it is put there by
`Figures`, with its path in `results.json` beside it in the markup, so that a test (and a reader) can hold one against
the other.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from clearhead.compare.layout import Layout
from clearhead.compare.results import collect

MINUS = "\N{MINUS SIGN}"
ABSENT = "n/a"

# Okabe and Ito's palette, told apart by people with every common colour blindness; light and dark page.
PALETTE = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#f5793a"),
    ("#009e73", "#2fc99d"),
    ("#b0568c", "#e39cc4"),
    ("#8a6d00", "#e6c229"),
    ("#5b4bb7", "#a99bf0"),
)
BASELINE_COLOUR = ("#4d4d4f", "#c9c9c6")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star")


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


def write(path: Path, text: str) -> None:
    """Write to a temporary name and rename it: a reader sees the old file or the new one."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8", newline="")
    os.replace(temporary, path)


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


class Figures:
    """Puts numbers on the page: `figure("arms.1.test.mean", "bits")` looks the path up and marks where it came from."""

    def __init__(self, results: Mapping[str, Any]) -> None:
        self.results = results

    def value(self, path: str) -> Any:
        """Return what stands at a path of keys and list indices; None when a part of it is None or missing."""
        found: Any = self.results
        for key in path.split("."):
            if isinstance(found, list):
                found = found[int(key)]
            elif isinstance(found, Mapping):
                found = found.get(key)
            else:
                return None
        return found

    def figure(self, path: str, form: str = "text", absent: str = ABSENT) -> Markup:
        """Return the formatted value as a span that names its path and format."""
        value = self.value(path)
        if value is None:
            return Markup('<span class="absent">{}</span>').format(absent)
        return Markup('<span data-ref="{}" data-format="{}">{}</span>').format(path, form, FORMATS[form](value))


def render(results: Mapping[str, Any]) -> str:
    """Return the page."""
    from plotly.offline import get_plotlyjs

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("clearhead.compare", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    figures = Figures(results)
    # "<" inside a script element could end it; JSON may write it as an escape.
    embedded = json.dumps({k: results[k] for k in ("arms", "tuning")}, allow_nan=False).replace("<", "\\u003c")
    page = environment.get_template("report.html.j2").render(
        results=results,
        figure=figures.figure,
        value=figures.value,
        styles=arm_styles(results),
        data=Markup(embedded),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        plain_value=plain_value,
    )
    return page


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
