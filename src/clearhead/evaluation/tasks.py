"""Run tasks of lm-eval and give back their scores. No torch here, and lm_eval only when a task runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clearhead.errors import UserError, nearest

MISSING = "--tasks needs lm_eval, which is not installed: pip install 'clearhead[eval]'"

ONE_PROCESS = "DISABLE_MULTIPROC"
DRAWS = 1000
"""Bootstrap samples behind the standard error of metrics that have no formula for it."""


@dataclass(frozen=True)
class TaskScore:
    """One metric of one task."""

    task: str
    metric: str
    value: float
    error: float | None
    """Standard error, where lm-eval gives one."""
    filter: str
    """Which of the task's filters the answers went through; usually "none"."""
    samples: int
    """Questions that were asked."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def run_tasks(
    model: Any,
    tasks: Sequence[str],
    folder: Path | str | None = None,
    *,
    limit: int | None = None,
    shots: int | None = None,
) -> list[TaskScore]:
    """Ask an lm-eval model (`ClearheadLM`, `HFLM`, ...) the questions of each task.

    Args:
        folder: of task files of one's own (.yaml), which come before lm-eval's. When all tasks are there, lm-eval's
            own 14,000 are not read at all.
        limit: questions per task at most, for a trial. shots: worked examples before each question.

    Raises `UserError` when lm_eval is missing, for an unknown task, and for task data that cannot be read.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(f"{MISSING} ({error})") from None
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--tasks-folder: no such folder: {folder}")
    manager = None
    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
    if manager is None or not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=None if folder is None else str(folder))
    for task in tasks:
        if task not in manager.all_tasks and not manager.match_tasks([task]):
            raise UserError(
                f"lm-eval has no task {task!r}{nearest(task, manager.all_tasks)}; give --tasks-folder for your own"
            )
    before = os.environ.get(ONE_PROCESS)
    os.environ[ONE_PROCESS] = "1"  # lm-eval would fork this process, torch and all, to draw its bootstrap samples
    try:
        found = lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            task_manager=manager,
            limit=limit,
            num_fewshot=shots,
            log_samples=False,
            bootstrap_iters=DRAWS,
        )
    except (ConnectionError, FileNotFoundError) as error:
        text = " ".join(str(error).split())
        raise UserError(f"lm-eval could not read the data of {', '.join(tasks)}: {text}") from error
    finally:
        if before is None:
            del os.environ[ONE_PROCESS]
        else:
            os.environ[ONE_PROCESS] = before
    assert found is not None  # None only on the further processes of a group
    return _scores(found)


def _scores(found: dict[str, Any]) -> list[TaskScore]:
    scores = []
    for task, values in found["results"].items():
        asked = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, comma, name = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{name}")
            scores.append(
                TaskScore(task, metric, float(value), float(error) if isinstance(error, float) else None, name, asked)
            )
    return scores
