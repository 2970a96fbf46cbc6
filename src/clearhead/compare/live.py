"""What is seen while a comparison runs: a live table on a terminal, one line per finished run elsewhere."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from clearhead.compare.plan import TUNING_SEED
from clearhead.compare.pool import Task, Worker
from clearhead.compare.records import SCORES, score_of
from clearhead.compare.verdict import Status


class Follower:
    """Reads a growing JSONL file piece by piece and keeps the newest training and evaluation line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        self.step: dict[str, Any] = {}
        self.evaluation: dict[str, Any] = {}

    def poll(self) -> None:
        """Read what was added; a half-written last line waits for its end."""
        try:
            if self.path.stat().st_size < self.position:  # a resumed run cut the file back to its checkpoint
                self.position = 0
            with open(self.path, "rb") as file:
                file.seek(self.position)
                text = file.read()
        except OSError:
            return
        whole = text[: text.rfind(b"\n") + 1]
        self.position += len(whole)
        for line in whole.splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if entry.get("kind") == "eval":
                self.evaluation = entry
            else:
                self.step = entry


def clock(seconds: float | None) -> str:
    """Print seconds as `45 s`, `3:20` or `1:02:05`."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Progress:
    """The live table: arm, seeds done, step, loss, tokens/s, time left. Give it to `run_tasks` as callbacks."""

    def __init__(
        self, title: str, tasks: Sequence[Task], done: Sequence[tuple[Task, Status]], workers: int, *, show: bool
    ) -> None:
        self.title = title
        self.tasks = [*(task for task, _ in done), *tasks]
        self.status: dict[Path, Status] = {task.folder: status for task, status in done}
        self.workers = workers
        self.console = Console()
        self.show = show
        self.live = Live(console=self.console, refresh_per_second=2) if show and self.console.is_terminal else None
        self.followers: dict[Path, Follower] = {}
        self.running: list[Worker] = []
        self.last_draw = 0.0
        self.seconds_per_step: dict[str, float] = {}
        self.first_seen: dict[Path, tuple[int, float]] = {}  # a resumed run does not begin at step 0

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.update(self.table())
            self.live.stop()

    def tick(self, running: Sequence[Worker], waiting: int) -> None:
        """Follow the running tasks and redraw, at most twice a second."""
        self.running = list(running)
        if not self.live or time.monotonic() - self.last_draw < 0.5:
            return
        self.last_draw = time.monotonic()
        for worker in self.running:
            follower = self._follower(worker.task)
            follower.poll()
            step = int(follower.step.get("step", 0))
            if step:
                first, since = self.first_seen.setdefault(worker.task.folder, (step, time.monotonic()))
                if step > first:
                    self.seconds_per_step[worker.task.arm] = (time.monotonic() - since) / (step - first)
        self.live.update(self.table())

    def end(self, task: Task, status: Status, reason: str) -> None:
        """Note what became of a task."""
        self.status[task.folder] = status
        follower = self._follower(task)
        follower.poll()
        if status is not Status.FINISHED and self.show:
            self.console.print(f"[yellow]{escape(task.label)}: {status}[/] {escape(reason)}", highlight=False)
        elif self.show and not self.live:
            bits = score_of(follower.evaluation)
            unit = next((name.replace("_", " ") for name in SCORES if name in follower.evaluation), "")
            value = f", validation {bits:.4f} {unit}" if isinstance(bits, float) else ""
            done = len(self.status)
            self.console.print(f"[{done}/{len(self.tasks)}] {task.label}: {status}{value}", markup=False)

    def _follower(self, task: Task) -> Follower:
        return self.followers.setdefault(task.folder, Follower(task.folder / "metrics.jsonl"))

    def seconds_left(self) -> float | None:
        """Estimate the time left over all tasks, from the pace so far; arms not seen yet take the mean pace."""
        if not self.seconds_per_step:
            return None
        mean = sum(self.seconds_per_step.values()) / len(self.seconds_per_step)
        left = 0.0
        for task in self.tasks:
            if task.folder not in self.status:
                done = int(self._follower(task).step.get("step", 0))
                left += self.seconds_per_step.get(task.arm, mean) * max(0, task.steps - done)
        return left / max(1, self.workers)

    def table(self) -> Table:
        """Draw the present state."""
        left = self.seconds_left()
        about = f", about {clock(left)} left" if left and len(self.status) < len(self.tasks) else ""
        table = Table(title=f"{self.title}: {len(self.status)} of {len(self.tasks)} runs{about}", title_justify="left")
        table.add_column("arm", no_wrap=True)
        for heading in ("done", "running", "step", "loss", "val bits", "tokens/s", "time left"):
            table.add_column(heading, justify="right", no_wrap=True)
        for arm in dict.fromkeys(task.arm for task in self.tasks):
            table.add_row(*self._row(arm))
        return table

    def _row(self, arm: str) -> list[str]:
        tasks = [task for task in self.tasks if task.arm == arm]
        done = [self.status[task.folder] for task in tasks if task.folder in self.status]
        failed = sum(status is not Status.FINISHED for status in done)
        count = f"{len(done)}/{len(tasks)}" + (f" [red]({failed} failed)[/]" if failed else "")
        active = [worker for worker in self.running if worker.task.arm == arm]
        if not active:
            return [escape(arm), count, "", "", "", self._mean_validation(tasks), "", ""]
        lines: list[tuple[str, ...]] = []
        for worker in active:
            step, evaluation = self._follower(worker.task).step, self._follower(worker.task).evaluation
            at, pace = int(step.get("step", 0)), self.seconds_per_step.get(arm)
            rate = step["tokens"] / at / pace if at and pace else None
            lines.append(
                (
                    f"seed {worker.task.seed}",
                    f"{at}/{worker.task.steps}",
                    _number(step.get("loss"), ".3f"),
                    _number(score_of(evaluation), ".3f"),
                    _number(rate, ",.0f"),
                    "scoring" if at >= worker.task.steps else clock(pace * (worker.task.steps - at)) if pace else "",
                )
            )
        return [escape(arm), count, *("\n".join(column) for column in zip(*lines, strict=True))]

    def _mean_validation(self, tasks: Sequence[Task]) -> str:
        """Return the mean of the finished runs' last validation values; over a grid of rates it would mean nothing."""
        values = []
        for task in tasks:
            if self.status.get(task.folder) is Status.FINISHED and task.seed < TUNING_SEED:
                follower = self._follower(task)
                if not follower.evaluation:
                    follower.poll()
                values.append(score_of(follower.evaluation))
        numbers = [value for value in values if isinstance(value, float)]
        return f"mean {sum(numbers) / len(numbers):.3f}" if numbers else ""


def _number(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, int | float) else ""
