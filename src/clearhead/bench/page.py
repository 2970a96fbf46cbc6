"""The Markdown page and its figures, a function of JSON records alone: nothing is measured, nothing is looked up."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.bench import plot
from clearhead.bench.disturbance import disturbances
from clearhead.bench.page_method import method
from clearhead.bench.registry import FAMILIES, OPERATIONS
from clearhead.bench.targets import STEP, judged, verdicts
from clearhead.errors import UserError

FORMAT = 1
KIND = "clearhead bench"
Record = Mapping[str, Any]


@dataclass(frozen=True)
class Page:
    """`text` is Markdown; `figures` are SVGs by file name, in a folder `images` beside the page."""

    text: str
    figures: dict[str, str]


def read_record(path: Path) -> dict[str, Any]:
    """Read what `clearhead bench --out` wrote. Raises `UserError` for anything else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(found, dict) or found.get("what") != KIND:
        raise UserError(f"{path}: not a record of `clearhead bench`; make one with --out")
    if found.get("format") != FORMAT:
        raise UserError(f"{path}: expected format {FORMAT}, got {found.get('format')}; measure again")
    return found


def make_page(records: Mapping[str, Record], page: str) -> Page:
    """The page called `page` (a path) of `records` by file name; raises `UserError` when there are none."""
    if not records:
        raise UserError("bench: a page needs at least one record; name files with --from, or measure")
    stem = Path(page).stem
    lines = [
        "# What an attention costs",
        "",
        "Time as a ratio to PyTorch's own `scaled_dot_product_attention` (in a training step: to our softmax model), "
        "measured in turns in one process. Lower is better. Rivals run at their best setting and stand here whoever "
        "wins. This page is made from its records by",
        "",
        f"    clearhead bench --page {page} --from {' '.join(records)}",
        "",
        "and a record by `clearhead bench --out FILE`. What is timed, and how, stands [below](#how-it-is-measured).",
    ]
    figures: dict[str, str] = {}
    for number, (name, record) in enumerate(records.items(), start=1):
        prefix = stem if len(records) == 1 else f"{stem}-{number}"
        lines += _section(name, record, prefix, figures)
    lines += method(records.values())
    return Page("\n".join(lines) + "\n", figures)


def _section(name: str, record: Record, prefix: str, figures: dict[str, str]) -> list[str]:
    machine = record["machine"]
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items() if value)
    where = machine["processor"] if record["plan"]["device"] == "cpu" else machine["device"]
    load = f"load {_load(record['load_before'])} before and {_load(record['load_after'])} after"
    lines = [
        "",
        f"## {where}, {machine['date'][:10]}",
        "",
        f"`{name}`: {versions}; commit {machine['commit'] or 'unknown'}; {machine['processor']}, {machine['cores']} "
        f"usable core(s), {machine['system']}; {machine['threads']} thread, {record['plan']['dtype']}; {load}; at "
        f"least {record['plan']['rounds']} rounds.",
    ]
    found = disturbances(record)
    lines += [line for words in found for line in ("", f"> Not a quiet machine: {words}.")]
    lines += _targets(record)
    lines += _winners(record)
    for operation in OPERATIONS:
        groups = [group for group in record["groups"] if group["operation"] == operation]
        if groups:
            lines += _operation(operation, groups, prefix, figures)
    lines += _memory(record)
    lines += _absent(record)
    return lines


def _load(load: Sequence[float] | None) -> str:
    return "unknown" if load is None else f"{load[0]:.2f}"


# ---- targets and winners ----


def _targets(record: Record) -> list[str]:
    lines = ["", "### Targets", ""]
    if not judged(record):
        return [*lines, "The marks are for a CPU in float32."]
    lines += ["| | mark | measured (median ratio) | |", "|---|---|---|---|"]
    for verdict in verdicts(record):
        shown = ", ".join(f"{where}: {ratio:.3f}" for where, ratio in verdict.measured.items()) or "-"
        words = verdict.words if verdict.words in ("met", "not measured") else f"**{verdict.words}**"
        lines.append(f"| {verdict.target.words} | {verdict.limit} | {shown} | {words} |")
    return lines


def _winners(record: Record) -> list[str]:
    """Rivals with the same result as ours, and less time."""
    lines = []
    for group in record["groups"]:
        results = group["results"]
        faster = []
        for name, one in results.items():
            ours = results.get(one["beside"] or one["equals"])
            rival = one["source"] not in ("torch", "clearhead")
            if rival and ours is not None and one["high_ratio"] < ours["low_ratio"]:
                faster.append(f"{name} ({one['median_ratio']:.2f} against {ours['median_ratio']:.2f})")
        if faster:
            lines.append(f"- {group['title']}: {', '.join(faster)}")
    if not lines:
        return ["", "### Who is faster than us", "", "Nobody who computes the same, beyond the quartiles of both."]
    words = (
        "Rivals that compute the same as ours, by more than the quartiles of both (their median ratio against ours):"
    )
    return ["", "### Who is faster than us", "", words, "", *lines]


# ---- tables ----


def _operation(operation: str, groups: Sequence[Record], prefix: str, figures: dict[str, str]) -> list[str]:
    about = OPERATIONS[operation]
    name = f"{prefix}-{operation.replace('+', '-')}.svg"
    draw = plot.steps if operation == STEP else plot.by_length
    figures[name] = draw(groups, FAMILIES)
    lines = ["", f"### {about.title}", "", f"{about.what[0].upper()}{about.what[1:]}: {_shapes(groups)}.", ""]
    what = "by model" if operation == STEP else "by length"
    lines += [f"![{about.title}: ratio {what}](images/{name})", ""]
    columns = [group["on"] or str(group["length"]) for group in groups]
    sizes = operation == STEP
    lines.append(f"| | {' | '.join(columns)} | {'weights' if sizes else 'same result as'} |")
    lines.append(f"|---|{'---|' * (len(columns) + 1)}")
    for family in FAMILIES:
        for row in _names(groups, family):
            lines.append(f"| {_bold(row, groups)} | {' | '.join(_cells(row, groups))} | {_last(row, groups, sizes)} |")
    return [*lines, "", "Median of the ratio (ratio of the minima); the baseline's own least time."]


def _shapes(groups: Sequence[Record]) -> str:
    return "; ".join(f"{group['on']} is {group['shape']}" if group["on"] else group["shape"] for group in groups)


def _names(groups: Sequence[Record], family: str) -> list[str]:
    found = {name: one for group in groups for name, one in group["results"].items() if one["family"] == family}
    return list(found)


def _bold(name: str, groups: Sequence[Record]) -> str:
    source = next(group["results"][name]["source"] for group in groups if name in group["results"])
    return f"**{name}**" if source == "clearhead" else name


def _cells(name: str, groups: Sequence[Record]) -> list[str]:
    cells = []
    for group in groups:
        one = group["results"].get(name)
        if one is None:
            cells.append("-")
        elif name == group["baseline"]:
            cells.append(f"1 ({_milliseconds(one['min_seconds'])})")
        else:
            cells.append(f"{one['median_ratio']:.2f} ({one['min_ratio']:.2f})")
    return cells


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"


def _last(name: str, groups: Sequence[Record], sizes: bool) -> str:
    rows = [group["results"][name] for group in groups if name in group["results"]]
    if sizes:
        return ", ".join(f"{one['parameters']:,}" for one in rows)
    if rows[0]["source"] == "clearhead":
        return ""
    if rows[0]["equals"] is None:
        return "another formula"
    far = max(one["difference"] or 0.0 for one in rows)
    return f"{rows[0]['equals']}, {f'to {far:.0e}' if far else 'exactly'}"


def _memory(record: Record) -> list[str]:
    groups = [g for g in record["groups"] if any(one["peak_bytes"] is not None for one in g["results"].values())]
    if not groups:
        return []
    heads = [f"{g['operation']}, {g['on'] or g['length']}" for g in groups]
    lines = ["", "### Peak memory", "", "In MB, above inputs and weights.", "", f"| | {' | '.join(heads)} |"]
    lines.append(f"|---|{'---|' * len(heads)}")
    for family in FAMILIES:
        for name in _names(groups, family):
            lines.append(f"| {_bold(name, groups)} | {' | '.join(_megabytes(name, g) for g in groups)} |")
    return lines


def _megabytes(name: str, group: Record) -> str:
    size = group["results"].get(name, {}).get("peak_bytes")
    return "-" if size is None else f"{size / 2**20:.1f}"


def _absent(record: Record) -> list[str]:
    found: dict[tuple[str, str, str], list[str]] = {}
    for group in record["groups"]:
        for one in group["absent"]:
            who = one["source"] if one["status"] == "not installed" else one["name"]
            found.setdefault((who, one["status"], one["reason"]), []).append(group["operation"])
    if not found:
        return []
    lines = ["", "### Not timed", ""]
    for (who, status, reason), operations in found.items():
        reason = f"`{reason}`" if status == "not installed" else reason
        lines.append(f"- {who} ({', '.join(dict.fromkeys(operations))}): {status}; {reason}")
    return lines
