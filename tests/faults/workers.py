"""`subprocess.Popen` of a comparison's workers and probe, forked instead of started: what they do is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from clearhead.compare import pool, probe, run, worker
from clearhead.compare.plan import ComparePlan

Begin = Callable[[int, Path], None]


def fork_workers(begin: Begin | None = None) -> None:
    """From now on this process forks its workers; each calls `begin(number, its folder)` before it trains."""
    started = 0

    class Forked:
        def __init__(self, command: list[str], *, stderr: Any = None, **rest: Any) -> None:
            nonlocal started
            started += 1
            self.returncode: int | None = None
            parent = os.getpid()
            self.pid = os.fork()
            if self.pid == 0:
                be_worker(command, stderr, parent, begin, started)

        def poll(self) -> int | None:
            if self.returncode is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
            return self.returncode

        def wait(self, timeout: float = 60.0) -> int:
            deadline = time.monotonic() + timeout
            while self.poll() is None:
                if time.monotonic() > deadline:
                    raise subprocess.TimeoutExpired("worker", timeout)
                time.sleep(0.01)
            assert self.returncode is not None
            return self.returncode

        def communicate(self) -> tuple[str, str]:
            self.wait(300.0)
            return "", ""

        def terminate(self) -> None:
            os.kill(self.pid, signal.SIGTERM)

        def kill(self) -> None:
            os.kill(self.pid, signal.SIGKILL)

    stand_in: Any = SimpleNamespace(Popen=Forked, TimeoutExpired=subprocess.TimeoutExpired, DEVNULL=None, PIPE=None)
    pool.subprocess = run.subprocess = stand_in
    pool.POLL_SECONDS = 0.02
    worker.PARENT_CHECK_SECONDS, worker.WAIT_SECONDS = 0.1, 0.05
    probe.WARM_UP, probe.ROUNDS = 1, 2


def be_worker(command: list[str], stderr: Any, parent: int, begin: Begin | None, number: int) -> None:
    """Be the worker or the probe that `command` names, and leave."""
    code = 1
    try:
        os.setsid()
        for name in os.listdir("/proc/self/fd"):  # a started process would not hold the command's lock
            try:
                if os.readlink(f"/proc/self/fd/{name}").endswith(".lock"):
                    os.close(int(name))
            except OSError:
                continue
        if stderr is not None:
            os.dup2(stderr.fileno(), 2)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        folder = Path(command[3])
        if begin is not None:
            begin(number, folder)
        if command[2] == "clearhead.compare.probe":
            pool.write_json(folder / "probe.json", probe.probe(ComparePlan.load(folder)))
            code = 0
        else:
            code = worker.main(folder, parent)
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        sys.stderr.flush()
        os._exit(code)


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def kill_group(parent: int) -> None:
    """SIGKILL the command and all of its workers at once, this process last."""
    for pid in [*children(parent), parent]:
        if pid != os.getpid():
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
