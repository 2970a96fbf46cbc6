"""`clearhead bench`. Imports torch only to measure: `--list` and `--page` with `--from` need none."""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import arg

from clearhead._arguments import merge, parse
from clearhead.errors import UserError, unknown

if TYPE_CHECKING:
    from clearhead.bench.plan import Group, Plan

RESULTS = Path("benchmarks/results")
LISTS = ("--operation", "--attention", "--rival", "--length", "--model", "--from")


@dataclass(frozen=True)
class Bench:
    """Time attentions against PyTorch's own, beside other libraries at their best; ratios, not seconds.

    One process, one thread, in turns: every round times everyone once, and ratios are taken within a round, so that a
    busy machine slows all alike. Before that everyone must give our result on the same inputs. A rival that is not
    installed is listed with the command that installs it. As it stands it takes about five minutes of one quiet core.
    """

    operation: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all four)")] = ()
    """forward | forward+backward | decode (one token against a cache) | step (a whole training step)."""
    attention: Annotated[tuple[str, ...], arg(metavar="SPEC ...", help_behavior_hint="(default: nine of them)")] = ()
    """Attention specs of ours. Each is also timed written out in plain torch, where that is a rival."""
    rival: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: all but compiled)")] = ()
    """written-out | x-transformers | transformers | nanogpt | compiled (torch.compile) | none."""
    length: Annotated[tuple[int, ...], arg(metavar="INT ...", help_behavior_hint="(default: 512 1024 2048)")] = ()
    """Queries, and keys."""
    model: Annotated[tuple[str, ...], arg(metavar="NAME ...", help_behavior_hint="(default: both)")] = ()
    """Of a training step: compare (the one that `clearhead compare` trains) | small (4 layers of width 128, context
    256, batch 8)."""
    quick: bool = False
    """Four attentions, one length, one model, no memory: under half a minute."""
    rounds: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 9)")] = None
    """Rounds at least; what is fast gets more."""
    batch: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 1)")] = None
    """Sequences at a time."""
    heads: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 4)")] = None
    """Heads."""
    head_dim: Annotated[int | None, arg(metavar="INT", help_behavior_hint="(default: 64)")] = None
    """Size of one head."""
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16", "float64"] | None,
        arg(metavar="{float32,bfloat16,float16,float64}", help_behavior_hint="(default: float32)"),
    ] = None
    """Type of queries, keys and values; training steps are float32."""
    device: Annotated[str | None, arg(metavar="STR", help_behavior_hint="(default: cpu)")] = None
    """cpu, cuda or mps."""
    memory: Annotated[bool, arg(help_behavior_hint="(default: yes, but not with --quick)")] = True
    """Measure peak memory, each in a process of its own."""
    list: bool = False
    """Say what could be measured, and what is not installed; measure nothing."""
    out: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Write everything measured, round by round, to this JSON file."""
    save: bool = False
    """The same, to benchmarks/results/bench-DEVICE-DATE.json (in a checkout)."""
    page: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Write a Markdown page with figures (in a folder images beside it)."""
    records: Annotated[
        tuple[Path, ...], arg(name="from", metavar="FILE ...", help_behavior_hint="(default: what is measured now)")
    ] = ()
    """With --page: make it from these JSON files, and measure nothing."""
    json: bool = False
    """Print the record as JSON instead of tables."""

    EXAMPLES = """
    clearhead bench --quick
    clearhead bench --save
    clearhead bench --operation forward+backward --attention laser laser+selective --length 1024 4096
    clearhead bench --operation step --rival none --model small
    clearhead bench --device cuda --dtype bfloat16 --batch 4 --heads 16 --length 2048 8192 --out gpu.json
    clearhead bench --page docs/benchmarks.md --from benchmarks/results/bench-cpu-2026-11-22.json
    clearhead bench --list
    """


def run(arguments: list[str]) -> int:
    """Carry out the command and return the exit code."""
    asked = parse(Bench, "bench", merge(arguments, *LISTS))
    if asked.list:
        _list()
        return 0
    if asked.records:
        _redraw(asked)
        return 0
    plan = _plan(asked)
    target = _target(asked, plan)
    record = _measure(asked, plan)
    if target is not None:
        from clearhead.bench.run import to_json

        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(to_json(record), encoding="utf-8")
    if asked.json:
        print(json.dumps(record))
    else:
        _print_end(record)
        if target is not None:
            print(f"written: {target}")
    if asked.page is not None:
        name = "FILE.json" if target is None else target.as_posix()
        _write_page(asked.page, {name: record}, say=not asked.json)
    return 0


def _plan(asked: Bench) -> Plan:
    from clearhead.bench.plan import RIVALS, Plan, quick

    rivals: tuple[str, ...] | None = asked.rival or None
    if "none" in asked.rival:
        if len(asked.rival) > 1:
            raise UserError("--rival none goes alone")
        rivals = ()
    for name in rivals or ():
        if name not in RIVALS:
            raise unknown("rival", name, (*RIVALS, "none"))
    changes: dict[str, Any] = {
        "operations": asked.operation or None,
        "specs": asked.attention or None,
        "rivals": rivals,
        "lengths": asked.length or None,
        "models": asked.model or None,
        **{name: getattr(asked, name) for name in ("rounds", "batch", "heads", "head_dim", "dtype", "device")},
        "memory": None if asked.memory else False,
    }
    start = quick() if asked.quick else Plan()
    plan = dataclasses.replace(start, **{name: value for name, value in changes.items() if value is not None})
    if asked.model and "step" not in plan.operations:
        raise UserError("--model is about training steps; add --operation step")
    if asked.length and not set(plan.operations) - {"step"}:
        raise UserError("--length is about attentions; a training step has the length of its --model")
    return plan


def _target(asked: Bench, plan: Plan) -> Path | None:
    """Where the record goes, checked before minutes are spent."""
    for path in (asked.out, asked.page):
        if path is not None and path.is_dir():
            raise UserError(f"{path} is a folder; name a file")
    if not asked.save:
        return asked.out
    if asked.out is not None:
        raise UserError("--save and --out both say where it goes; give one of them")
    if not RESULTS.is_dir():
        raise UserError(f"--save writes to {RESULTS}, which is not here; go to a checkout, or name a file with --out")
    device = plan.device.replace(":", "-")
    return RESULTS / f"bench-{device}-{datetime.datetime.now(datetime.UTC).date().isoformat()}.json"


def _redraw(asked: Bench) -> None:
    from clearhead.bench.page import read_record

    if asked.page is None:
        raise UserError("--from goes with --page: it names the records that the page is made of")
    if dataclasses.replace(asked, page=None, records=()) != Bench():
        raise UserError("--from makes a page and measures nothing; leave the other options out")
    if asked.page.is_dir():
        raise UserError(f"{asked.page} is a folder; name a file")
    _write_page(asked.page, {path.as_posix(): read_record(path) for path in asked.records}, say=True)


def _write_page(target: Path, records: Mapping[str, Mapping[str, Any]], *, say: bool) -> None:
    from clearhead.bench.page import make_page

    page = make_page(records, target.as_posix())
    images = target.parent / "images"
    images.mkdir(parents=True, exist_ok=True)
    target.write_text(page.text, encoding="utf-8")
    for name, svg in page.figures.items():
        (images / name).write_text(svg, encoding="utf-8")
    if say:
        print(f"the page is in {target}")


def _list() -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from clearhead.bench.registry import COMPETITORS, OPERATIONS, SOURCES

    console = Console()
    for operation in OPERATIONS.values():
        line = f"{operation.name}: {operation.what}; ratios to {operation.baseline}"
        console.print(Text(line), soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("competitor", "from", "operations", "must give the result of"):
        table.add_column(name)
    for one in COMPETITORS:
        where = one.source + ("" if one.default else ", on request")
        table.add_row(one.name, where, " ".join(one.operations), one.equals or "-")
    console.print(table)
    for source in SOURCES.values():
        state = "" if source.installed else f"; NOT INSTALLED: {source.pip}"
        console.print(Text(f"{source.name}: {source.what}{state}"), soft_wrap=True)


# ---- measuring, and what is seen of it ----


def _measure(asked: Bench, plan: Plan) -> dict[str, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from clearhead._run_commands import as_user_error
    from clearhead.bench.machine import load_average
    from clearhead.bench.run import run as measure

    error_console = Console(stderr=True)
    load = load_average()
    if load is not None and not asked.json:
        print(f"load before: {load[0]:.2f}", flush=True)
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=error_console, transient=True) as progress, as_user_error():
        return measure(plan, _Shown(progress, len(plan.groups()), tables=not asked.json))


class _Shown:
    """A progress bar on stderr, and each group's table on stdout as it is done."""

    def __init__(self, progress: Any, groups: int, *, tables: bool) -> None:
        self.progress, self.tables, self.done = progress, tables, 0
        self.task = progress.add_task("", total=groups)
        self.title = ""

    def group(self, group: Group) -> None:
        """See `clearhead.bench.run.Watcher`."""
        self.title = group.title

    def doing(self, words: str, share: float) -> None:
        """See `clearhead.bench.run.Watcher`."""
        self.progress.update(self.task, completed=self.done + 0.95 * share, description=f"{self.title}: {words}")

    def measured(self, found: dict[str, Any]) -> None:
        """See `clearhead.bench.run.Watcher`."""
        self.done += 1
        self.progress.update(self.task, completed=self.done)
        if self.tables:
            _print_group(found)


def _print_group(found: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    base = found["results"][found["baseline"]]
    memory = any(one["peak_bytes"] is not None for one in found["results"].values())
    table = Table(
        title=f"{found['title']} ({found['rounds']} rounds, {found['baseline']} {1e3 * base['min_seconds']:.3g} ms)",
        title_justify="left",
        box=None,
        pad_edge=False,
        header_style="bold",
    )
    table.add_column("", no_wrap=True)
    for name in ("median", "quartiles", "minimum", *(["peak MB"] if memory else ())):
        table.add_column(name, justify="right")
    if found["operation"] == "step":
        table.add_column("weights", justify="right")
    for name, one in found["results"].items():
        cells = [
            f"{one['median_ratio']:.2f}",
            f"{one['low_ratio']:.3g}-{one['high_ratio']:.3g}",
            f"{one['min_ratio']:.2f}",
        ]
        if memory:
            cells.append("-" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:.1f}")
        if found["operation"] == "step":
            cells.append(f"{one['parameters']:,}")
        table.add_row(name, *cells, style="bold" if one["source"] == "clearhead" else "")
    console = Console()
    console.print(table)
    for one in found["absent"]:
        style = "yellow" if one["status"] == "not installed" else "red"
        console.print(Text(f"{one['name']}: {one['status']}: {one['reason']}", style=style), soft_wrap=True)
    console.print()


def _print_end(record: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.text import Text

    from clearhead.bench.disturbance import disturbances
    from clearhead.bench.targets import verdicts

    console = Console()
    measured = [verdict for verdict in verdicts(record) if verdict.measured]
    for verdict in measured:
        shown = ", ".join(f"{where}: {ratio:.3f}" for where, ratio in verdict.measured.items())
        style = "green" if verdict.words == "met" else "red"
        line = f"{verdict.target.words} {verdict.limit}: {shown}: {verdict.words}"
        console.print(Text(line, style=style), soft_wrap=True)
    before, after = record["load_before"], record["load_after"]
    if before is not None:
        print(f"load {before[0]:.2f} before, {after[0]:.2f} after")
    for words in disturbances(record):
        console.print(Text(f"not a quiet machine: {words}", style="yellow"), soft_wrap=True)
