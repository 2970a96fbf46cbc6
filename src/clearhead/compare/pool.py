"""Runs tasks in worker processes: so many at a time, in the order given, one failure never stopping the rest.

A task is a folder that holds `task.json`; the worker (`clearhead.compare.worker`) trains in that folder. Whatever it
writes to standard error is kept as `stderr.txt`; when it dies, `crash.json` says how.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from clearhead._disk import write_whole

SAVE_SECONDS = 60.0
"""How long a worker may take to save after it was asked to stop, before it is killed."""
POLL_SECONDS = 0.2
STOPPED = 3
"""Exit code of a worker that was asked to stop, and saved first: neither a result nor a crash."""
TAIL_CHARACTERS = 4000


@dataclass(frozen=True)
class Task:
    """One run: who it is, its folder, and the configuration that the worker reads."""

    arm: str
    seed: int
    folder: Path
    config: dict[str, Any]
    steps: int

    @property
    def label(self) -> str:
        """A short name for messages."""
        return f"{self.arm}, seed {self.seed}"


@dataclass
class Worker:
    """A running process and its task."""

    task: Task
    process: subprocess.Popen[bytes]
    started: float


def run_tasks(
    tasks: Sequence[Task],
    workers: int,
    *,
    on_tick: Callable[[Sequence[Worker], int], None] | None = None,
    on_end: Callable[[Task, int], None] | None = None,
) -> None:
    """Run every task, at most `workers` at a time.

    `on_tick(running, waiting)` is called a few times a second, `on_end(task, exit code)` after each task. On Ctrl-C or
    SIGTERM every worker is asked to save and stop, then `KeyboardInterrupt` is raised.
    """
    waiting = deque(tasks)
    running: list[Worker] = []
    with _terminate_is_interrupt():
        try:
            while waiting or running:
                while waiting and len(running) < workers:
                    running.append(_start(waiting.popleft()))
                for worker in [w for w in running if w.process.poll() is not None]:
                    running.remove(worker)
                    _record_end(worker.task, worker.process.returncode)
                    if on_end:
                        on_end(worker.task, worker.process.returncode)
                if on_tick:
                    on_tick(running, len(waiting))
                if running:
                    time.sleep(POLL_SECONDS)
        except BaseException:
            _stop(running)
            raise


def environment_of_worker() -> dict[str, str]:
    """Return the environment of a worker: one thread in every numerical library, nothing buffered."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {**os.environ, **dict.fromkeys(threads, "1"), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


def _start(task: Task) -> Worker:
    task.folder.mkdir(parents=True, exist_ok=True)
    (task.folder / "crash.json").unlink(missing_ok=True)
    write_json(task.folder / "task.json", {"arm": task.arm, "seed": task.seed, "config": task.config})
    with open(task.folder / "stderr.txt", "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "clearhead.compare.worker", str(task.folder), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=environment_of_worker(),
            start_new_session=True,  # Ctrl-C reaches only this process, which then asks the workers in its own way
        )
    return Worker(task, process, time.monotonic())


def _record_end(task: Task, code: int) -> None:
    """Leave `crash.json` when a worker ended badly; a run that trained to its end has written its own result."""
    if code in (0, STOPPED):
        return
    text = (task.folder / "stderr.txt").read_text(errors="replace").strip()
    last = text.splitlines()[-1].strip() if text else ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        why = " (often: out of memory)" if name == "SIGKILL" else ""
        reason = f"killed by {name}{why}"
    else:
        reason = last or f"exit code {code}, nothing on standard error"
    write_json(
        task.folder / "crash.json", {"exit_code": code, "reason": reason, "stderr_tail": text[-TAIL_CHARACTERS:]}
    )


def _stop(running: Sequence[Worker]) -> None:
    for worker in running:
        if worker.process.poll() is None:
            worker.process.terminate()
    deadline = time.monotonic() + SAVE_SECONDS
    try:
        for worker in running:
            worker.process.wait(max(0.1, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for worker in running:
            if worker.process.poll() is None:
                worker.process.kill()
                worker.process.wait()


@contextmanager
def _terminate_is_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C while the pool runs (only the main thread may install handlers)."""

    def handler(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGTERM, handler)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON to a temporary name and rename it, so that no reader ever sees half a file."""
    write_whole(path, json.dumps(value, indent=1, allow_nan=False) + "\n")
