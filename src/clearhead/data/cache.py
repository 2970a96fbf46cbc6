"""Where data is kept, and how a folder appears there: whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clearhead._disk import disk_error, words
from clearhead.errors import UserError

Progress = Callable[[str], None]
"""Takes one line about what is being done now."""

_STALE_SECONDS = 24 * 3600
_BLOCK = 1 << 20


def cache_folder() -> Path:
    """Return the folder of fetched and prepared data: `$CLEARHEAD_DATA`, or the platform's cache folder."""
    chosen = os.environ.get("CLEARHEAD_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_cache_dir("clearhead", appauthor=False))


def tell(progress: Progress | None, line: str) -> None:
    """Report one line, where somebody listens."""
    if progress is not None:
        progress(line)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def json_sha256(value: Any) -> str:
    """Return the SHA-256 of a JSON value in its canonical form (sorted keys, no spaces)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name beside `path` and rename it, so that a reader never sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".tmp-{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, ensure_ascii=False)
            stream.write("\n")
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` when the block ends well, and vanishes otherwise.

    Two processes may build the same folder at once: renaming a folder is atomic, the first one wins, and
    the other's copy, equal by construction, is dropped. A damaged `final` must be moved away first, by
    `discard`.
    """
    parent = final.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _sweep(parent)
        building = Path(tempfile.mkdtemp(dir=parent, prefix=f".tmp-{final.name}-"))
        handle = _hold(building)
    except OSError as error:
        raise UserError(
            f"cannot write to the data folder {parent} ({error.strerror}); set CLEARHEAD_DATA to a writable folder"
        ) from error
    try:
        yield building
        _publish(building, final)
    except Exception as error:
        fault = disk_error(error)
        if fault is None or not building.exists():
            raise
        raise UserError(f"cannot write to the data folder {parent}: {words(fault)}; nothing half-made stays") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)
        if handle is not None:
            os.close(handle)


def discard(folder: Path) -> None:
    """Remove a damaged folder: out of the way in one step, then deleted."""
    grave = folder.with_name(f".tmp-damaged-{folder.name}-{os.getpid()}-{time.monotonic_ns()}")
    try:
        os.rename(folder, grave)
    except FileNotFoundError:
        return  # another process was faster
    except OSError as error:
        raise UserError(f"{folder} is damaged and cannot be removed ({error.strerror})") from error
    shutil.rmtree(grave, ignore_errors=True)


def _publish(building: Path, final: Path) -> None:
    try:
        os.rename(building, final)
    except OSError:
        if not final.is_dir():
            raise


def _sweep(parent: Path) -> None:
    """Delete what killed processes left behind, once it is a day old and nobody holds it.

    The age alone would not do: a clock that jumps ahead makes a folder old that is being filled.
    """
    now = time.time()
    for path in parent.glob(".tmp-*"):
        try:
            if now - path.stat().st_mtime > _STALE_SECONDS:
                if not path.is_dir():
                    path.unlink(missing_ok=True)
                    continue
                handle = _hold(path)
                shutil.rmtree(path, ignore_errors=True)
                if handle is not None:
                    os.close(handle)
        except OSError:
            continue  # held, or gone


def _hold(folder: Path) -> int | None:
    """Lock a folder for as long as the handle is open; `BlockingIOError` when another process has it.

    None where the system, or the kind of disk, has no such locks.
    """
    try:
        import fcntl
    except ImportError:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        if isinstance(error, BlockingIOError):
            raise
        return None
    return handle
