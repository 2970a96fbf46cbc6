"""Carries a plan out: check, measure speed, train every arm with every seed, judge, report.

Nothing is trained before the whole plan is known to be sound: the text is prepared, every arm's model is built. The
folder holds everything, so the same command goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from clearhead._disk import disk_errors
from clearhead.compare import costs, environment, equal_rate, report, results, tuning
from clearhead.compare.layout import Layout
from clearhead.compare.live import Progress
from clearhead.compare.plan import TUNING_SEED, ComparePlan
from clearhead.compare.pool import Task, environment_of_worker, run_tasks, write_json
from clearhead.compare.records import load_record, read_json
from clearhead.compare.verdict import Status
from clearhead.errors import UserError

LEFT_BY_A_START = (".lock", ".plan.json.")
"""What a first start that was killed leaves: its lock, and perhaps a plan that has not got its name yet."""
DONE = (Status.FINISHED, Status.DIVERGED)
"""A diverged run is a result. A crashed one is tried again by the next command: the machine may have been at fault."""


def compare(plan: ComparePlan, folder: Path | str | None = None, *, progress: bool = True) -> dict[str, Any]:
    """Run what is missing of `plan` in `folder`, write the report there, and return the results.

    Args:
        plan: what to compare.
        folder: where; a folder that holds the same plan is gone on with. None = the plan's own.
        progress: show a live table.

    Returns the value that `results.json` holds (see `clearhead.compare.results.collect`).
    Raises `UserError` for a folder that holds something else, for text that cannot be read, for an arm that cannot be
    built; `KeyboardInterrupt` after Ctrl-C, once every worker has saved and the interim report is written.
    """
    layout = Layout(Path(folder or plan.folder or plan.default_folder()))
    console = Console(quiet=not progress)
    check_folder(layout, plan)
    texts = prepare_texts(plan, console)
    resolved = costs.resolve(plan) if plan.budget != "time" else None  # builds every arm's model
    with disk_errors(f"{layout.folder}", "the runs that ended are kept, and the same command goes on"):
        layout.folder.mkdir(parents=True, exist_ok=True)
        with hold(layout):
            made = carry_out(plan, layout, texts, resolved, console, show=progress)
    for arm in made["arms"]:
        if not arm["baseline"]:
            console.print(arm["comparison"]["sentence"], markup=False, highlight=False)
    console.print(f"report: {layout.report}", markup=False)
    return made


def carry_out(
    plan: ComparePlan,
    layout: Layout,
    texts: Mapping[Any, Mapping[str, Any]],
    resolved: dict[str, Any] | None,
    console: Console,
    *,
    show: bool,
) -> dict[str, Any]:
    """Do what is missing in a folder that is held; return the results. `resolved`: None = the speed decides it."""
    check_text(layout, texts)
    if not layout.plan.exists():
        write_json(layout.plan, plan.to_dict())
    with session(layout, plan):
        try:
            speed = measure_speed(layout, console)
            if resolved is None:
                resolved = costs.resolve(plan, {name: arm["median_seconds"] for name, arm in speed.items()})
            resolved["data"] = texts[plan.base.data]
            write_json(layout.resolved, resolved)
            announce(plan, resolved, layout, console)
            execute(plan, layout, resolved, console, show=show)
        except KeyboardInterrupt:
            report.redraw(layout.folder)
            console.print(f"stopped; the same command goes on. Interim report: {layout.report}", markup=False)
            raise
    return report.redraw(layout.folder)


def check_folder(layout: Layout, plan: ComparePlan) -> None:
    """Raise `UserError` when the folder holds another plan, or things that are not a comparison."""
    if layout.plan.exists():
        there = ComparePlan.load(layout.folder)
        differences = plan.differences(there)
        if differences:
            raise UserError(
                f"{layout.folder} holds another comparison ({'; '.join(differences)}); choose another output folder, "
                "or repeat the command that made it. It cannot be extended: seeds or arms added once results were seen "
                "would make its intervals wrong"
            )
    elif layout.folder.exists() and (
        not layout.folder.is_dir() or any(not p.name.startswith(LEFT_BY_A_START) for p in layout.folder.iterdir())
    ):
        raise UserError(
            f"{layout.folder} exists and holds no comparison; choose an empty or new folder, nothing there was touched"
        )


def prepare_texts(plan: ComparePlan, console: Console) -> dict[Any, dict[str, Any]]:
    """Prepare each different data configuration once, before any worker needs it; return their summaries."""
    from clearhead.data.synthetic.source import SyntheticData
    from clearhead.data.text import prepare

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    configs = [plan.base.data, *(arm.apply(plan.base).data for arm in plan.arms)]
    return {
        config: (prepare(config, progress=tell) if config.synthetic is None else SyntheticData(config)).summary
        for config in dict.fromkeys(configs)
    }


def check_text(layout: Layout, texts: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raise `UserError` when the text is no longer what the folder's runs were trained on."""
    if not layout.resolved.exists():
        return
    before = (read_json(layout.resolved) or {}).get("data", {}).get("fingerprint")
    now = {summary["fingerprint"] for summary in texts.values()}
    if before is not None and before not in now:
        raise UserError(
            f"the text has changed since {layout.folder} was begun, so its runs cannot be gone on with; "
            "choose another output folder, or bring the text back"
        )


@contextlib.contextmanager
def hold(layout: Layout) -> Iterator[None]:
    """Keep a second command out of the folder (on systems with `fcntl`)."""
    with open(layout.lock, "a") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError:
            raise UserError(f"another `clearhead compare` is at work in {layout.folder}; wait for it to end") from None
        yield


@contextlib.contextmanager
def session(layout: Layout, plan: ComparePlan) -> Iterator[None]:
    """Write down who ran this, on what and for how long; a session that found nothing to do leaves no line."""
    before = {path: path.stat().st_mtime_ns for path in layout.folder.glob("*/*/*/result.json")}
    start, facts = time.monotonic(), environment.describe(plan.base)
    facts |= {"workers": worker_count(plan), "command": own_command()}
    try:
        yield
    finally:
        runs = {path: path.stat().st_mtime_ns for path in layout.folder.glob("*/*/*/result.json")}
        if runs != before or not layout.sessions.exists():
            facts |= {
                "seconds": round(time.monotonic() - start, 1),
                "load_average_end": environment.load_average(),
                "runs_ended": sum(runs[path] != before.get(path) for path in runs),
            }
            append_line(layout.sessions, json.dumps(facts, allow_nan=False))


def append_line(path: Path, line: str) -> None:
    """Add a line; what a kill tore off in the middle of one stays a line of its own."""
    with open(path, "a+b") as file:
        file.seek(0, 2)
        if file.tell():
            file.seek(-1, 2)
            line = line if file.read(1) == b"\n" else "\n" + line
        file.write(f"{line}\n".encode())


def own_command() -> str | None:
    """Return the command line when this process is the `clearhead` command."""
    name = Path(sys.argv[0]).name
    return shlex.join(["clearhead", *sys.argv[1:]]) if name in ("clearhead", "clearhead.exe") else None


def worker_count(plan: ComparePlan) -> int:
    """Return how many runs go at a time: what the plan says, else one for each core; a GPU is not shared."""
    if plan.workers is not None:
        return plan.workers
    from clearhead.train.world import choose_device

    return environment.usable_cores() if choose_device(plan.base.train.device, 0).type == "cpu" else 1


def measure_speed(layout: Layout, console: Console) -> dict[str, Any]:
    """Run the speed probe in a process of its own, once for each folder; return its figures by arm."""
    if read_json(layout.probe) is None:  # absent, or damaged: measured (again)
        layout.probe.unlink(missing_ok=True)
        console.print("measuring the speed of one training step of each arm ...")
        command = [sys.executable, "-m", "clearhead.compare.probe", str(layout.folder)]
        process = subprocess.Popen(
            command,
            env=environment_of_worker(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            _, errors = process.communicate()
        except BaseException:
            process.kill()
            process.wait()
            raise
        if process.returncode or not layout.probe.exists():
            last = errors.strip().splitlines()[-1] if errors.strip() else f"exit code {process.returncode}"
            write_json(layout.probe, {"failed": last, "arms": {}})
            console.print(f"[yellow]the speed probe failed ({last}); the comparison goes on without it[/]")
    arms: dict[str, Any] = json.loads(layout.probe.read_text(encoding="utf-8"))["arms"]
    return arms


def announce(plan: ComparePlan, resolved: Mapping[str, Any], layout: Layout, console: Console) -> None:
    """Print what is compared: each arm's exact difference and what it costs."""
    console.print(f"{len(plan.arms)} arms, {len(plan.seeds)} seeds, in {layout.folder}", markup=False, highlight=False)
    console.print(resolved["budget"]["words"], markup=False, highlight=False)
    for name, arm in resolved["arms"].items():
        changes = ", ".join(f"{row['key']}={row['value']}" for row in arm["difference"]) or "the baseline"
        size = f"{arm['parameters']['total']:,} parameters, {arm['flops_per_token'] / 1e6:.3f} MFLOP per token"
        if name != plan.baseline:
            size += f" ({arm['parameters_ratio']:.4f} and {arm['flops_ratio']:.4f} times the baseline's)"
        console.print(f"  {name}: {changes}; {size}", markup=False, highlight=False)


def execute(plan: ComparePlan, layout: Layout, resolved: Mapping[str, Any], console: Console, *, show: bool) -> None:
    """Run the tuning runs of a grid, choose, then the runs that count, then those that a verdict between
    different rates waits for. Order: seed by seed over all arms."""
    if plan.learning_rates:
        tasks = [
            task(plan, arm.name, seed, layout.tuning_run(arm, rate, seed), resolved, rate)
            for seed in tuning.tuning_seeds(plan)
            for rate in plan.learning_rates
            for arm in plan.arms
        ]
        run_missing("choosing learning rates", tasks, plan, show=show)
    rates: dict[str, float | None] = {arm.name: tuning.choose(plan, layout, arm) for arm in plan.arms}
    if plan.learning_rates:
        chosen = ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate is not None)
        console.print(f"learning rates chosen on validation: {chosen}", markup=False, highlight=False)
    tasks = [
        task(plan, arm.name, seed, layout.run(arm, seed), resolved, rates[arm.name])
        for seed in plan.seeds
        for arm in plan.arms
    ]
    run_missing("comparing", tasks, plan, show=show)
    if plan.learning_rates:
        judged = results.judge(plan, results.read_records(plan, layout), equal_rate.rates(plan, layout))
        tasks = [
            task(plan, arm.name, seed, layout.equal_rate_run(arm, rate, seed), resolved, rate)
            for arm, rate in equal_rate.wanted(plan, judged.values())
            for seed in plan.seeds
        ]
        run_missing("checking verdicts at one learning rate", tasks, plan, show=show)


def task(
    plan: ComparePlan, name: str, seed: int, folder: Path, resolved: Mapping[str, Any], rate: float | None
) -> Task:
    """Make one run of an arm. A tuning run scores next to nothing of the test text, which is not its business."""
    steps = resolved["arms"][name]["steps"]
    config = costs.run_config(plan.arm(name).apply(plan.base), steps=steps, seed=seed, rate=rate)
    if seed >= TUNING_SEED:
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, test_tokens=1))
    return Task(name, seed, folder, config.to_dict(), steps)


def run_missing(title: str, tasks: Sequence[Task], plan: ComparePlan, *, show: bool) -> None:
    """Run the tasks that have no result yet."""
    done = [(t, record.status) for t in tasks if (record := load_record(t.folder, t.arm, t.seed)).status in DONE]
    finished = {t.folder for t, _ in done}
    missing = [t for t in tasks if t.folder not in finished]
    if not missing:
        return
    workers = min(worker_count(plan), len(missing))
    with Progress(title, missing, done, workers, show=show) as live:

        def ended(task: Task, code: int) -> None:
            record = load_record(task.folder, task.arm, task.seed)
            live.end(task, record.status, record.reason)

        run_tasks(missing, workers, on_tick=live.tick, on_end=ended)
