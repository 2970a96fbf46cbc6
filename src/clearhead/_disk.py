"""Writing to a disk that may be full, read-only or shared: whole files, or one line that says why not. No torch."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from clearhead.errors import UserError

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR)


def disk_error(error: BaseException) -> OSError | None:
    """The fault of the disk that `error` tells of, or None: a full one, a read-only one, missing rights, a bad name.

    safetensors raises an error of its own, with the system's number in its text.
    """
    if isinstance(error, OSError):
        return error if error.errno in (*NO_SPACE, *REFUSED) else None
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    if found is None or int(found[1]) not in (*NO_SPACE, *REFUSED):
        return None
    return OSError(int(found[1]), os.strerror(int(found[1])))


def words(error: OSError) -> str:
    """What is wrong, in a few words."""
    return "no space left on the disk" if error.errno in NO_SPACE else f"cannot be written ({error.strerror or error})"


@contextmanager
def disk_errors(what: str, consolation: str) -> Iterator[None]:
    """Turn whatever the system says of a write into one line for the person; `consolation` says what is not lost."""
    try:
        yield
    except Exception as error:
        fault = error if isinstance(error, OSError) else disk_error(error)
        if fault is None:
            raise
        advice = "; free some space and run again" if fault.errno in NO_SPACE else ""
        raise UserError(f"{what}: {words(fault)}; {consolation}{advice}") from error


def write_durably(path: Path, data: bytes) -> None:
    """Write a file and flush it to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def replace_durably(path: Path, data: bytes, *, part: str = "") -> None:
    """Write a file under another name and rename it: a reader finds the old bytes or the new ones.

    `part` tells the writers of one file apart. Without it what a crash left behind is overwritten the next time.
    """
    temporary = path.with_name(f".{path.name}{part}.part")
    try:
        write_durably(temporary, data)
        os.replace(temporary, path)
        flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """`replace_durably` for a file that several processes may write at once: the last one's bytes, whole, stay."""
    replace_durably(path, text.encode(), part=f".{os.getpid()}")


def flush_folder(folder: Path) -> None:
    """Flush a folder's list of names, where the system can (POSIX)."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
