"""What `clearhead inspect` prints: facts, verdict, a table by layer, findings, advice. Imports no torch.

Everything is legible without colour: what a colour says also stands there as a sign or a word.
"""

from __future__ import annotations

import io
from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from clearhead.signal import view, words
from clearhead.signal.findings import Advice, Finding, Report

COLOURS = {"untrainable": "bold red", "harmful": "yellow", "note": "cyan"}
VERDICTS = {"untrainable": "bold red", "trainable": "bold green", "trained": "bold green"}
SIGNS = {"untrainable": "!!", "harmful": "!", "note": "."}
WIDE = 110
"""From so many columns on the table has one more quantity."""

# Key, the heading's two lines, width of one number, its format.
COLUMNS: tuple[tuple[str, str, int, Callable[[float | None], str]], ...] = (
    ("stream_variance", "stream variance", 7, words.brief),
    ("correlation", "token corr.", 6, words.correlation),
    ("gradient_variance", "gradient var.", 7, words.brief),
    ("score_deviation", "score spread", 5, words.brief),
    ("entropy_share", "entropy", 4, words.share),
)
WIDE_COLUMNS = (
    *COLUMNS,
    ("largest_weight", "largest weight", 6, words.brief),
    ("parameter_gradient", "weight gradient", 7, words.brief),
)


def as_text(report: Report, width: int = 80) -> str:
    """Return what `print_report` prints, without colour."""
    stream = io.StringIO()
    print_report(report, Console(file=stream, width=width, color_system=None, force_terminal=False, highlight=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def print_report(report: Report, console: Console) -> None:
    """Print a report: about a screen for a model of up to 24 layers."""
    console.print(Text(report.title, style="bold"))
    facts = ", ".join(
        f"{words.label(key)} {words.fact(value)}"
        for key, value in report.facts.items()
        if value is not None and not isinstance(value, dict)
    )
    if facts:
        console.print(Text(facts, style="dim"))
    colour = VERDICTS.get(report.verdict, "bold cyan")
    console.print(Padding(Text(words.verdict_sentence(report), style=colour), (1, 0)))
    for stack in view.stacks_of(report):
        _layers(report, stack, console)
    _findings(report, console)
    _advice(report, console)
    _notes(report, console)


def _layers(report: Report, stack: str, console: Console) -> None:
    rows = view.rows_of(view.traces_of(report), stack)
    by_layer = view.layer_rows(rows)
    findings = [finding for finding in report.findings if finding.stack == stack]
    layers, step = view.shown_layers(list(by_layer), [f.depth for f in findings if f.depth is not None])
    measured = report.measured is not None
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column("layer", justify="right", no_wrap=True)
    columns = WIDE_COLUMNS if console.width >= WIDE else COLUMNS
    used = [column for column in columns if any(_pair(rows, column[0]) != (None, None) for rows in by_layer.values())]
    for _, heading, size, _form in used:
        below = f"\n{'theory':>{size}} {'real':>{size}}" if measured else "\ntheory"
        table.add_column(f"{heading}{_short(below, size, measured)}", justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)

    for layer in layers:
        here = [finding for finding in findings if finding.depth == layer]
        _row(table, str(layer), by_layer[layer], used, measured, here)
    for row in rows:
        if row.part == view.STACK_PLACES["output"]:
            _row(table, "out", [row], used, measured, [])
    name = f"{stack.capitalize()} by layer: " + ("theory beside measurement" if measured else "theory alone")
    console.print(Text(name, style="bold"))
    console.print(table)
    legend = [view.thinned(step, len(by_layer), "report.html")]
    if any(finding.depth is not None for finding in findings):
        legend.append("A sign at the right: a finding sets in here.")
    if text := " ".join(part for part in legend if part):
        console.print(Text(text, style="dim"))
    console.print()


def _short(below: str, size: int, measured: bool) -> str:
    """Shorten the second line of a heading where the numbers are narrow."""
    return f"\n{'th.':>{size}} {'real':>{size}}" if measured and size < len("theory") else below


def _pair(rows: list[view.Row], key: str) -> tuple[float | None, float | None]:
    quantity = view.BY_KEY[key]
    return view.of_layer(rows, quantity, "predicted"), view.of_layer(rows, quantity, "measured")


def _row(
    table: Table,
    name: str,
    rows: list[view.Row],
    columns: list[tuple[str, str, int, Callable[[float | None], str]]],
    measured: bool,
    here: list[Finding],
) -> None:
    cells = []
    for key, _, size, form in columns:
        predicted, found = _pair(rows, key)
        if (predicted, found) == (None, None):
            cells.append("")
            continue
        cells.append(f"{form(predicted):>{size}} {form(found):>{size}}" if measured else form(predicted))
    worst = words.by_severity(here)[0][1].severity if here else None
    table.add_row(name, *cells, SIGNS.get(worst, "") if worst else "", style=COLOURS.get(worst, "") if worst else None)


def _findings(report: Report, console: Console) -> None:
    console.print(Text("Findings", style="bold"))
    if not report.findings:
        console.print("  None.")
    table = Table.grid(padding=(0, 1))
    table.add_column(no_wrap=True)
    table.add_column()
    for _, finding in words.by_severity(report.findings):
        colour = COLOURS.get(finding.severity, "")
        title = words.capital(words.title(finding, report))
        evidence = f"{words.capital(finding.evidence)} ({words.SOURCES.get(finding.source, finding.source)})"
        table.add_row(
            Text(f"  {SIGNS.get(finding.severity, '?'):<2} {finding.severity}", colour),
            Text.assemble((title, "bold"), f" ({words.location(finding)})\n{evidence}"),
        )
    if report.findings:
        console.print(table)
    console.print()


def _advice(report: Report, console: Console) -> None:
    if not report.advice:
        return
    console.print(Text("Advice, checked by the theory", style="bold"))
    for place, advice in enumerate(report.advice, start=1):
        _one_advice(place, advice, report, console)
    console.print()


def _one_advice(place: int, advice: Advice, report: Report, console: Console) -> None:
    console.print(Text(f"  {place}. {advice.title}", style="bold"))
    _code(advice.line, console)
    _indented(advice.reason, console)
    if advice.cures:
        _indented(f"Cures: {words.kinds_in_words(advice.cures)}.", console)
    if advice.leaves:
        _indented(f"Leaves: {words.kinds_in_words(advice.leaves)}.", console)
    changes = view.changes(report, advice.predicted)
    stacks = view.stacks_of(report)
    for stack in stacks:
        here = [change for change in changes if change.stack == stack]
        pairs = [(change.title, words.brief(change.before), words.brief(change.after)) for change in here]
        listed = "; ".join(f"{title} {before} -> {after}" for title, before, after in pairs if before != after)
        where = f" in the {stack}" if len(stacks) > 1 else ""
        _indented(f"The theory{where}, now -> after: {listed or 'the same'}.", console)
    if advice.command:
        _indented("Compare before with after:", console)
        _code(advice.command, console)


def _notes(report: Report, console: Console) -> None:
    notes = list(dict.fromkeys(note for trace in view.traces_of(report).values() for note in trace.notes))
    if notes:
        console.print(Text("Notes", style="bold"))
    for note in notes:
        _indented(note, console, "dim")


def _indented(text: str, console: Console, style: str = "") -> None:
    console.print(Padding(Text(words.capital(text), style=style), (0, 0, 0, 5)))


def _code(text: str, console: Console) -> None:
    """Print a line to copy: never broken by us, whatever the width."""
    for line in text.splitlines():
        console.print(f"     [green]{escape(line)}[/]", soft_wrap=True, highlight=False)
