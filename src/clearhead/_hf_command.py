"""`clearhead hf list`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import arg

from clearhead._arguments import merge, parse
from clearhead.errors import UserError, unknown

if TYPE_CHECKING:
    from clearhead.hf.listing import Cell, Table

HELP = """\
usage: clearhead hf list [options]         which architectures of transformers can be patched with what, by running it
       clearhead hf list --help            its options

To patch a model of your own, in Python:

  import clearhead as ch
  report = ch.hf.patch(model, "laser")     # any model of transformers; the report names each layer
  ch.hf.unpatch(model)                     # bit-identical outputs

examples
  clearhead hf list                                                every architecture, some minutes
  clearhead hf list --architecture llama bert t5 --spec laser      a few
  clearhead hf list --markdown table.md --json table.json          stopped, the same command goes on
"""
ACTIONS = ("list",)


@dataclass(frozen=True)
class HfList:
    """Patch a tiny random model of each architecture of transformers, check it, and print what works.

    Nothing is downloaded. A cell is works, refused (with the reason), or FAILS (a bug); see `docs/hf-architectures.md`.
    """

    spec: Annotated[tuple[str, ...], arg(metavar="SPEC ...", help_behavior_hint="(default: eight of them)")] = ()
    """Attention specs, a column each: softmax, laser, softmax+selective, window:8, ..."""
    architecture: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all)")] = ()
    """Architectures, by transformers' own names: llama, bert, t5, vit, ..."""
    markdown: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """Write the table there as a page."""
    json: Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """Keep the cells there. Cells that it holds from the same versions and source are not made again."""

    EXAMPLES = """
    clearhead hf list --architecture llama bert t5 --spec softmax laser
    clearhead hf list --spec performer bigbird:block_size=4 --json cells.json
    clearhead hf list --markdown docs/hf-architectures.md
    """


def run(arguments: list[str]) -> int:
    """Carry out one action and return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP, end="")
        return 0 if arguments else 2
    if arguments[0] not in ACTIONS:
        raise unknown("action of hf", arguments[0], ACTIONS)
    return _list(parse(HfList, "hf list", merge(arguments[1:], "--spec", "--architecture")))


def _list(asked: HfList) -> int:
    from clearhead.attention.spec import AttentionSpec
    from clearhead.hf import zoo
    from clearhead.hf.zoo_entries import ENTRIES

    for spec in asked.spec:  # before anything heavy: a misspelt name is answered at once
        AttentionSpec.parse(spec)
    for name in asked.architecture:
        zoo.find(name)
    for path in (asked.markdown, asked.json):
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
    library = zoo.transformers_or_error()
    import torch
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from clearhead.hf.listing import SPECS, make_table, markdown

    rows = asked.architecture or tuple(name for name, entry in ENTRIES.items() if not entry.extra)
    print(f"transformers {library.__version__}, torch {torch.__version__}", flush=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(rows) * len(asked.spec or SPECS))

        def show(cell: Cell) -> None:
            progress.update(task, advance=1, description=f"{cell.architecture} {cell.spec}")

        table = make_table(rows, asked.spec, keep=asked.json, on_cell=show)
    _print(table)
    if asked.markdown is not None:
        asked.markdown.parent.mkdir(parents=True, exist_ok=True)
        asked.markdown.write_text(markdown(table), encoding="utf-8")
        print(f"the page is in {asked.markdown}")
    return 0


STYLES = {
    "works": "green",
    "mended": "green",
    "as own": "yellow",
    "refused": "dim",
    "fails": "bold red",
    "absent": "dim",
}


def _print(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    from clearhead.hf.listing import WORDS, notes, rows_of

    console = Console()
    architectures, specs = rows_of(table)
    numbered = notes(table)
    shown = RichTable(box=None, pad_edge=False, header_style="bold")
    shown.add_column("architecture", no_wrap=True)
    for spec in specs:
        shown.add_column(spec, overflow="fold")

    def words(cell: Cell) -> Any:
        number = numbered.get(cell.reason)
        text = WORDS[cell.status] + (f" ({number})" if number else "")
        return Text(text, style=STYLES[cell.status])

    for name in architectures:
        shown.add_row(name, *(words(table.cells[name, spec]) for spec in specs))
    console.print(shown)
    for reason, number in numbered.items():
        console.print(Text(f"({number}) {reason}"), soft_wrap=True)
    counted = {status: table.count(status) for status in WORDS}
    console.print(", ".join(f"{number} {WORDS[status]}" for status, number in counted.items() if number))
