"""Commands in forked children: to be killed at a chosen moment, starved of disk, robbed of rights. Linux only.

A child is forked from this process, which has imported everything: no start costs seconds, and what a command writes
is what it would write anyway. Moments are counted in *file events* below a folder (opening to write, renaming,
removing, flushing), or in CPU time.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass
class Ended:
    """How a child ended: exit code (negative: the signal that killed it), and what it said."""

    code: int
    out: str
    err: str

    @property
    def last(self) -> str:
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""


class Child:
    """A command at work in a process of its own."""

    def __init__(self, command: Callable[[], int | None]) -> None:
        self.files = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            act(command, self.files[0].fileno(), self.files[1].fileno())
        self.code: int | None = None

    def cpu_seconds(self) -> float:
        try:
            return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[0]) / 1e9
        except (OSError, IndexError):
            return 0.0

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def kill_after(self, cpu_seconds: float) -> None:
        """SIGKILL once it has computed for so long, unless it has ended."""
        while self.poll() is None:
            if self.cpu_seconds() >= cpu_seconds:
                os.kill(self.pid, signal.SIGKILL)
                return
            time.sleep(0.004)

    def wait(self, within: float = 300.0) -> Ended:
        deadline = time.monotonic() + within
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                deadline = float("inf")
            time.sleep(0.01)
        texts = []
        for file in self.files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        assert self.code is not None
        return Ended(self.code, *texts)


def forked(command: Callable[[], int | None], within: float = 300.0) -> Ended:
    """Run `command` in a child and wait for its end."""
    return Child(command).wait(within)


def act(command: Callable[[], int | None], out: int, err: int) -> None:
    """Be the child: run, and leave without any of the parent's clean-up."""
    code = 1
    try:
        os.setsid()
        faulthandler.disable()  # pytest's would print a page for a child that is meant to die
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115
        sys.stdout = io.TextIOWrapper(open(1, "wb", buffering=0, closefd=False), write_through=True)  # noqa: SIM115
        sys.stderr = io.TextIOWrapper(open(2, "wb", buffering=0, closefd=False), write_through=True)  # noqa: SIM115
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = command() or 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def on_file_events(folder: Path, act_on: Callable[[str, str], object]) -> None:
    """Call `act_on(event, path)` before each file event below `folder`, in this process from now on."""
    root = str(folder)

    def seen(event: str, path: Any, dir_fd: Any = None) -> None:
        text = os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""
        inside = text.startswith(root) or (not os.path.isabs(text) and dir_fd not in (None, -1))
        if inside:
            act_on(event, text)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & WRITES:
                seen(event, path)
        elif event in EVENTS:
            seen(event, arguments[0], arguments[-1])

    flush = os.fsync

    def fsync(handle: int) -> None:
        path = os.readlink(f"/proc/self/fd/{handle if isinstance(handle, int) else handle.fileno()}")
        seen("fsync", path)
        flush(handle)

    os.fsync = fsync
    sys.addaudithook(hook)


def die_at(folder: Path, event: int, victim: Callable[[], object] | None = None) -> None:
    """SIGKILL this process before its so-many-th file event (`victim`: what to do instead)."""
    seen = 0

    def count(name: str, path: str) -> None:
        nonlocal seen
        seen += 1
        if seen == event:
            (victim or suicide)()

    on_file_events(folder, count)


def suicide() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def count_events(folder: Path, command: Callable[[], int | None]) -> tuple[Ended, list[str]]:
    """Run `command` to its end in a child; return how it ended and the events that it went through itself."""
    read, write = os.pipe()

    def counted() -> int | None:
        own = os.getpid()

        def tell(name: str, path: str) -> None:
            if os.getpid() == own:  # not what it forks
                os.write(write, f"{name} {Path(path).name}\n".encode())

        on_file_events(folder, tell)
        return command()

    child = Child(counted)
    os.close(write)
    with open(read, "rb") as pipe:
        events = pipe.read().decode().splitlines()
    return child.wait(), events


# ---- disks and rights ----

MS_RDONLY, MS_REMOUNT, MS_REC, MS_PRIVATE = 1, 32, 16384, 1 << 18
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000


def mount(target: Path, options: str, flags: int = 0) -> bool:
    return LIBC.mount(b"tmpfs", os.fsencode(target), b"tmpfs", flags, options.encode()) == 0


class SmallDisk:
    """A disk of its own below `place`, in this process alone: a tmpfs, or where none may be mounted a limit on sizes.

    To be used in a child: a mount and a limit end with the process.
    """

    def __init__(self, place: Path, size: str = "4m") -> None:
        self.place, self.size = place, size
        place.mkdir(parents=True, exist_ok=True)
        uid, gid = os.getuid(), os.getgid()
        space = CLONE_NEWNS if uid == 0 else CLONE_NEWNS | CLONE_NEWUSER
        self.real = LIBC.unshare(space) == 0
        if self.real and uid != 0:
            Path("/proc/self/setgroups").write_text("deny")
            Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
            Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        if self.real:
            LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)
            self.real = mount(place, f"size={size}")
        self.kind = "tmpfs" if self.real else "RLIMIT_FSIZE"

    def fill(self) -> None:
        """Take all that is left."""
        if not self.real:
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
            return
        with contextlib.suppress(OSError), open(self.place / ".filler", "ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        with contextlib.suppress(OSError), open(self.place / ".filler", "ab", buffering=0) as file:
            while True:
                file.write(bytes(1 << 12))

    def free(self) -> None:
        """Give it back, and twice as much."""
        if not self.real:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return
        (self.place / ".filler").unlink(missing_ok=True)

    def read_only(self, yes: bool) -> bool:
        """Remount; False where that is not to be had."""
        return self.real and mount(self.place, f"size={self.size}", MS_REMOUNT | (MS_RDONLY if yes else 0))


@contextlib.contextmanager
def without_privilege() -> Iterator[None]:
    """Root's rights over other people's files, put aside: a folder that forbids writing then forbids it to root."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    kept = (ctypes.c_uint32 * 6)()
    LIBC.capget(header, kept)
    bare = (ctypes.c_uint32 * 6)(*kept)
    bare[0] = bare[3] = 0  # effective, both halves
    LIBC.capset(header, bare)
    try:
        yield
    finally:
        LIBC.capset(header, kept)
