"""Writes an inspection as `report.html`, one page that works offline, and `inspect.json`. Imports no torch.

The page is for a person who does not know the theory: what is wrong and which line repairs it come first, in words.
Every number on it comes from the `Report`: `columns` lays it out by stack and depth, this layout is embedded in the
page, and the text, the tables and the plots all read it. `clearhead._page` says how such pages are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clearhead import _page
from clearhead._disk import disk_errors
from clearhead._page import DASHES, PALETTE, SYMBOLS, embedded, write
from clearhead.signal import view, words
from clearhead.signal.findings import Report
from clearhead.signal.stored import NAME, plain, to_json

PAGE = "report.html"
MINUS = "\N{MINUS SIGN}"
NOT_FINITE = {"nan": "undefined", "inf": "infinite", "-inf": f"{MINUS}infinite"}


def _typeset(form: Callable[[Any], str]) -> Callable[[Any], str]:
    """Use a true minus sign, and words for what is not finite; such values arrive as strings (see `stored`)."""

    def typeset(value: Any) -> str:
        text = form(float(value) if isinstance(value, str) else value)
        return NOT_FINITE.get(text, text.replace("-", MINUS))

    return typeset


FORMATS: dict[str, Callable[[Any], str]] = {
    "number": _typeset(words.number),
    "correlation": _typeset(words.correlation),
    "share": _typeset(words.share),
    "fact": lambda value: words.fact(value),
}
FORM_OF = {
    "correlation": "correlation",
    "raw_correlation": "correlation",
    "branch_correlation": "correlation",
    "gradient_correlation": "correlation",
    "entropy_share": "share",
}
"""Quantity -> format, where it is not `number`."""

# Key, whether the axis is logarithmic, what the reader should look for.
SIGNAL = (
    ("stream_variance", True, "Level is good. A steep rise drowns late layers, a steep fall starves them."),
    (
        "sum_variance",
        True,
        "What the norm behind each branch reads. Its size decides how much of the gradient comes back.",
    ),
    ("branch_variance", True, "What each layer adds. Far below the stream's variance, the layer does almost nothing."),
    ("branch_share", True, "Added up over all branches: by how much a small change of every weight is amplified."),
    ("correlation", False, "Near 1, all tokens have become copies of one another."),
)
GRADIENT = (
    ("gradient_variance", True, "Read it from right to left, the way the correction travels. Level is good."),
    ("parameter_gradient", True, "Layers far below the others hardly learn."),
)
ATTENTION = (
    ("score_deviation", False, "Far below 1: an even average. Above about 4: single tokens take everything."),
    ("entropy_share", False, "100 %: all tokens alike. Near 0 %: a single token."),
    ("largest_weight", False, "Near 1, the favourite token takes everything."),
    ("jacobian_gain", True, "Near 0, softmax hands on no correction. At most 1/4."),
    ("attention_rank", False, "Near 1, every token looks at the same mixture."),
)
SHORT_TABLE = (
    "stream_variance",
    "correlation",
    "gradient_variance",
    "parameter_gradient",
    "score_deviation",
    "entropy_share",
)
MARKED = {
    "exploding_signal": ("stream_variance", "sum_variance"),
    "update_amplification": ("branch_share",),
    "silent_branches": ("branch_share", "branch_variance"),
    "rank_collapse": ("correlation",),
    "vanishing_gradient": ("gradient_variance",),
    "exploding_gradient": ("gradient_variance",),
    "dead_matrix": ("parameter_gradient",),
    "attention_saturation": tuple(key for key, _, _ in ATTENTION),
    "not_finite": ("stream_variance", "gradient_variance"),
}
"""Kind of finding -> figures in which the layer where it sets in is marked."""
GROUPS = {"stream": "Stream", "gradient": "Gradient", "attention": "Attention", "parameters": "Weights"}


def write_report(report: Report, folder: Path | str) -> Path:
    """Write `report.html` and `inspect.json` into a folder, which is made if need be; return the page's path.

    `clearhead.signal.stored.read` brings the report back. Raises `UserError` for a disk that cannot be written.
    """
    place = Path(folder)
    with disk_errors(f"{place}", "what was there before is untouched"):
        place.mkdir(parents=True, exist_ok=True)
        write(place / NAME, to_json(report))
        write(place / PAGE, render(report))
    return place / PAGE


def render(report: Report) -> str:
    """Return the page."""
    data = columns(report)
    figures = _page.Figures(data, FORMATS)
    return _page.render(
        "signal/report.html.j2",
        report=report,
        data=data,
        embedded=embedded(data),
        figure=figures.figure,
        verdict=words.verdict_sentence(report),
        findings=words.by_severity(report.findings),
        cured_by=_cured_by(report),
        tables=[_short_table(report, stack) for stack in view.stacks_of(report)],
        sections={"signal": SIGNAL, "gradient": GRADIENT, "attention": ATTENTION},
        glossary=[quantity for quantity in view.QUANTITIES if quantity.meaning],
        quantities=view.BY_KEY,
        forms=FORM_OF,
        ours=isinstance(report.facts.get("init"), str),
        words=words,
        palette=PALETTE,
        styles=_styles(report),
    )


def columns(report: Report) -> dict[str, Any]:
    """Return everything that the page shows, as strict JSON's own types (numbers that are not finite as strings).

    `stacks[i].values[quantity][source]` has one entry for each of `stacks[i].rows`; None where there is no value.
    """
    stacks = []
    for stack in view.stacks_of(report):
        rows = view.rows_of(view.traces_of(report), stack)
        matrices = view.matrices_of(rows)
        names = list(dict.fromkeys(name for _, name in matrices))
        quantities = [*view.QUANTITIES, *(view.matrix(name) for name in names)]
        values = {quantity.key: _sources(rows, quantity, report) for quantity in quantities}
        stacks.append(
            {
                "name": stack,
                "rows": [{"layer": row.layer, "part": row.part, "x": row.x} for row in rows],
                "layers": len(view.layer_rows(rows)),
                "values": {key: by_source for key, by_source in values.items() if by_source},
                "matrices": [{"part": part, "name": name, "key": f"matrix.{name}"} for part, name in matrices],
                "after": [_after(advice.predicted, stack) for advice in report.advice],
                "marks": _marks(report, stack),
                "gaps": {key: _gap(rows, key, log) for key, log, _ in (*SIGNAL, *GRADIENT, *ATTENTION)},
            }
        )
    return plain(
        {
            "title": report.title,
            "sources": list(view.traces_of(report)),
            "stacks": stacks,
            "quantities": _headings(stacks),
            "groups": GROUPS,
            "findings": [{"value": finding.value, "threshold": finding.threshold} for finding in report.findings],
            "advice": [
                {
                    "title": advice.title,
                    "overrides": [{"key": key, "value": value} for key, value in advice.overrides.items()],
                    "changes": [
                        {"stack": c.stack, "key": c.key, "title": c.title, "before": c.before, "after": c.after}
                        for c in view.changes(report, advice.predicted)
                    ],
                }
                for advice in report.advice
            ],
            "facts": _facts(report.facts),
            "runs": {source: _facts(trace.facts) for source, trace in view.traces_of(report).items()},
        }
    )


def _sources(rows: list[view.Row], quantity: view.Quantity, report: Report) -> dict[str, list[float | None]]:
    """Return a column for each source that has the quantity at all."""
    found = {source: [row.value(quantity, source) for row in rows] for source in view.traces_of(report)}
    return {source: column for source, column in found.items() if any(value is not None for value in column)}


def _headings(stacks: list[dict[str, Any]]) -> list[dict[str, str]]:
    present = dict.fromkeys(key for stack in stacks for key in stack["values"])
    known = {key: (quantity.title, quantity.group) for key, quantity in view.BY_KEY.items()}
    return [
        {"key": key, "title": title, "group": group, "form": FORM_OF.get(key, "number")}
        for key in present
        for title, group in (known.get(key, (key.removeprefix("matrix."), "parameters")),)
    ]


def _after(trace: Any, stack: str) -> dict[str, Any]:
    """Return the curves that the theory gives a stack after an advice."""
    rows = [row for row in view.rows_of({"predicted": trace}, stack) if row.x is not None]
    keys = ("stream_variance", "sum_variance", "branch_variance", "branch_share", "correlation", "gradient_variance")
    return {
        "x": [row.x for row in rows],
        "part": [row.part for row in rows],
        "values": {key: [row.value(view.BY_KEY[key], "predicted") for row in rows] for key in keys},
    }


def _marks(report: Report, stack: str) -> list[dict[str, Any]]:
    return [
        {"depth": finding.depth, "figures": MARKED.get(finding.kind, ()), "words": words.mark(finding, report)}
        for finding in report.findings
        if finding.stack == stack and finding.depth is not None
    ]


def _gap(rows: list[view.Row], key: str, log: bool) -> str:
    """Say which values a figure cannot draw; empty when it draws all."""
    said = []
    for source, name in (("predicted", "theory"), ("measured", "measurement")):
        pairs = [(row, row.value(view.BY_KEY[key], source)) for row in rows if row.x is not None]
        known = [(row, value) for row, value in pairs if value is not None]
        wild = [row for row, value in known if not math.isfinite(value)]
        zero = [row for row, value in known if log and value <= 0.0]
        for missing, what in ((wild, "infinite or undefined"), (zero, "exactly 0")):
            if missing:
                where = "the output" if missing[0].layer is None else f"layer {missing[0].layer}"
                said.append(f"of the {name}, {len(missing)} of {len(known)} values are {what}, the first at {where}")
    return f"Not drawn: {'; '.join(said)}." if said else ""


def _facts(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"key": str(key), "label": words.label(str(key)), "value": value} for key, value in facts.items()]


def _cured_by(report: Report) -> dict[str, list[int]]:
    """Return kind of finding -> numbers of the advices that cure it, counted from 1."""
    found: dict[str, list[int]] = {}
    for place, advice in enumerate(report.advice, start=1):
        for kind in advice.cures:
            found.setdefault(kind, []).append(place)
    return found


def _short_table(report: Report, stack: str) -> dict[str, Any]:
    """Return which layers the short table shows, and for each of its cells the row of `columns` that it quotes."""
    rows = view.rows_of(view.traces_of(report), stack)
    index = {id(row): place for place, row in enumerate(rows)}
    by_layer = view.layer_rows(rows)
    found = [f for f in report.findings if f.stack == stack and f.depth is not None]
    layers, step = view.shown_layers(list(by_layer), [f.depth for f in found if f.depth is not None])
    lines = [(str(layer), by_layer[layer], [f for f in found if f.depth == layer]) for layer in layers]
    lines += [("output", [row], []) for row in rows if row.part == view.STACK_PLACES["output"]]
    shown: list[dict[str, Any]] = []
    used: dict[str, None] = {}
    for name, here, findings in lines:
        cells: dict[str, int | None] = {}
        for key in SHORT_TABLE:
            for source in view.traces_of(report):
                holder = next((row for row in here if row.value(view.BY_KEY[key], source) is not None), None)
                cells[f"{key}.{source}"] = None if holder is None else index[id(holder)]
                used |= {} if holder is None else {key: None}
        severity = words.by_severity(findings)[0][1].severity if findings else ""
        shown.append({"name": name, "cells": cells, "severity": severity})
    keys = [key for key in SHORT_TABLE if key in used]
    return {"keys": keys, "lines": shown, "words": view.thinned(step, len(by_layer), "the table of every number")}


def _styles(report: Report) -> dict[str, Any]:
    """Return colours, dashes and symbols: theory and measurement, the parts of a layer, each advice."""
    parts = ("attention", "cross_attention", "feed_forward")
    return {
        "predicted": PALETTE[0],
        "measured": PALETTE[1],
        "advice": [PALETTE[2 + place % (len(PALETTE) - 2)] for place in range(len(report.advice))],
        "advice_dash": [DASHES[1 + place % (len(DASHES) - 1)] for place in range(len(report.advice))],
        "parts": {part: {"dash": DASHES[i], "symbol": SYMBOLS[i]} for i, part in enumerate(parts)},
    }
