"""The folder of a run: whose it is, who holds it, and how it ended.

config.json  tokenizer.json  metrics.jsonl  checkpoint/  result.json  [tensorboard/]
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead._disk import disk_errors, replace_durably
from clearhead.errors import UserError
from clearhead.train.checkpoint import FOLDER
from clearhead.train.config import RunConfig

CONFIG, METRICS, RESULT, TOKENIZER, LOCK = "config.json", "metrics.jsonl", "result.json", "tokenizer.json", ".lock"
ENDED = ("finished", "diverged")


class InUse(UserError):
    """Another process holds the folder."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended. `summary` is what `result.json` holds; see `clearhead.train.summary`."""

    status: str
    """finished | diverged | interrupted (the same command goes on) | crashed (only ever read from result.json)."""
    reason: str
    """Why, when it is not "finished"; else empty."""
    folder: Path
    summary: dict[str, Any]


@contextmanager
def claim(folder: Path, config: RunConfig, *, resume: bool) -> Iterator[None]:
    """Hold `folder` for this run while the `with` block lasts, and see that it is a new one or this config's.

    Raises `UserError` when another process holds it, it holds another config or files of unknown origin, and, without
    `resume`, when it holds a run at all. Nothing in it is changed in these cases.
    """
    with disk_errors(f"{folder}", "nothing was changed"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / LOCK, "a+")  # noqa: SIM115 (held for the whole block)
    with lock:
        _lock(lock, folder)
        _check_owner(folder, config, resume)
        new = not (folder / CONFIG).exists()
        if new:
            write_json(folder / CONFIG, config.to_dict())
        try:
            yield
        except BaseException:
            # A start that failed before anything was made (no such text, say) must not claim the folder for its config.
            if new and not any((folder / name).exists() for name in (METRICS, FOLDER, RESULT)):
                (folder / CONFIG).unlink(missing_ok=True)
            raise


def read_result(folder: Path) -> RunResult | None:
    """Return how the run in `folder` ended, or None. An unreadable result counts as none: it is computed anew."""
    try:
        values = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        return RunResult(values["status"], values["reason"], folder, values["summary"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_result(result: RunResult) -> None:
    """Write `result.json` in one go."""
    values = {"status": result.status, "reason": result.reason, "summary": result.summary}
    write_json(result.folder / RESULT, values)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write strict JSON under another name, flush it, and rename it."""
    with disk_errors(path.name, "what was there before is untouched"):
        replace_durably(path, (json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def read_config(folder: Path) -> RunConfig:
    """Return the config that a run folder was made for. Raises `UserError` when it is missing or broken."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no run: {CONFIG} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected the JSON object of a run's config")
    try:
        return RunConfig.from_dict(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say what differs between two configs' plain values, one "part.key is X there, Y here" each."""
    lines = []
    for part in here:
        a, b = there.get(part, {}), here[part]
        lines += [
            f"{part}.{key} is {a.get(key)!r} there, {b.get(key)!r} here"
            for key in dict.fromkeys([*a, *b])
            if a.get(key) != b.get(key)
        ]
    return lines


def _check_owner(folder: Path, config: RunConfig, resume: bool) -> None:
    if not (folder / CONFIG).exists():
        foreign = [name for name in (METRICS, FOLDER, RESULT) if (folder / name).exists()]
        if foreign:
            raise UserError(
                f"{folder} holds {foreign[0]} but no {CONFIG}: not a run that can go on; use another folder"
            )
        return
    if not resume:
        raise UserError(f"{folder} already holds a run; use another folder, or resume it")
    there, here = read_config(folder).to_dict(), config.to_dict()
    there["train"]["parallel"] = here["train"]["parallel"]  # among how many a step is shared is no part of the run
    found = differences(there, here)
    if found:
        shown = "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
        raise UserError(f"{folder} holds another run: {shown}; use another folder")


def _lock(lock: Any, folder: Path) -> None:
    """Lock the file for as long as it is open. The system lets go when the process dies, however it dies."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(lock.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        else:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.seek(0)
        holder = lock.read(80).strip()
        who = f" ({holder})" if holder else ""
        raise InUse(f"{folder} is in use by another process{who}; wait for it or use another folder") from None
    with suppress(OSError):  # who holds it is a courtesy: a full disk does not stop the run here
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), f"process {os.getpid()}".encode())
