"""`clearhead evaluate RUN --tasks NAME ...`: a run on tasks of lm-eval. Used by `cli.py`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING

from clearhead._run_commands import as_user_error
from clearhead.errors import UserError
from clearhead.evaluation.tasks import MISSING, TaskScore, run_tasks

if TYPE_CHECKING:
    from clearhead._options import Evaluate

OWN = ("run", "tasks", "tasks_folder", "limit", "shots", "context", "device", "json")


def evaluate_tasks(asked: Evaluate) -> None:
    """Ask a run the questions of tasks and print the scores."""
    for entry in dataclasses.fields(asked):
        if entry.name not in OWN and getattr(asked, entry.name) != entry.default:
            raise UserError(f"--{entry.name} means nothing with --tasks, which say themselves what is asked")
    if find_spec("lm_eval") is None:
        raise UserError(MISSING)
    from clearhead.evaluation.lm_model import ClearheadLM

    # lm-eval prints as it goes; stdout is for the scores alone.
    with as_user_error(), contextlib.redirect_stdout(sys.stderr):
        model = ClearheadLM(asked.run, context=asked.context, device=asked.device)
        scores = run_tasks(model, asked.tasks, asked.tasks_folder, limit=asked.limit, shots=asked.shots)
    if asked.json:
        about = {"run": str(asked.run), "context": model.max_length, "scores": [score.to_dict() for score in scores]}
        print(json.dumps(about, indent=1, ensure_ascii=False))
    else:
        _print(scores, model.max_length)


def _print(scores: list[TaskScore], context: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="tasks of lm-eval", title_justify="left")
    for name, justify in (("task", "left"), ("metric", "left"), ("score", "right"), ("questions", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for score in scores:
        metric = score.metric if score.filter == "none" else f"{score.metric} ({score.filter})"
        value = f"{score.value:.4f}" if score.error is None else f"{score.value:.4f} ± {score.error:.4f}"
        table.add_row(score.task, metric, value, f"{score.samples:,}")
    Console().print(table)
    print(f"± is lm-eval's standard error; context {context}")
