"""Saturation rescue: a wrong key is ahead by a gap, and the free scores must let the right key in.

8 free scores; the right key has the value v, the others 0; the wrong one starts ahead by g. Descent on
(O - v/2)^2 / v^2 until the output is within a tenth of v/2. All cells (gap, value, rate) run in one batch, since they
do not touch each other. Everything goes through the library's functions, in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from clearhead import functional as F

GAPS = (3.0, 6.0, 9.0, 12.0)
VALUES = (1.0, 4.0, 8.0)
RATES = {"descent": (0.1, 1.0, 10.0, 100.0), "adam": (0.01, 0.03, 0.1, 0.3)}
KEYS, MOST = 8, 20_000
WITHIN = 0.05
"""Of v: how near to v/2 the output must come."""
METHODS: dict[str, Callable[..., Tensor]] = {
    "softmax": F.softmax_attention,
    "LASER": F.laser_attention,
    "self_adjust product": partial(F.self_adjust_attention, form="product"),
    "self_adjust range": partial(F.self_adjust_attention, form="range"),
    "self_adjust range, detached": partial(F.self_adjust_attention, form="range", detach_extrema=True),
}


@dataclass(frozen=True)
class Job:
    """All gaps, values and rates of one method under one optimizer."""

    method: str
    optimizer: str
    most: int = MOST

    @property
    def key(self) -> tuple[str, str]:
        """What tells it from all others."""
        return (self.method, self.optimizer)


def jobs(*, quick: bool = False) -> list[Job]:
    """Every method under both optimizers."""
    most = 60 if quick else MOST
    return [Job(method, optimizer, most) for optimizer in RATES for method in METHODS]


def cells(optimizer: str) -> list[tuple[float, float, float]]:
    """(gap, value, rate), in the order of the batch."""
    return [(gap, value, rate) for gap in GAPS for value in VALUES for rate in RATES[optimizer]]


def output(method: str, scores_cm: Tensor, values_c: Tensor) -> Tensor:
    """O of every cell, [c]; the right key is the first."""
    ones = torch.ones(len(scores_cm), 1, 1, 1, dtype=scores_cm.dtype)
    values = torch.zeros_like(scores_cm)
    values[:, 0] = values_c
    return METHODS[method](ones, scores_cm[:, None, :, None], values[:, None, :, None], scale=1.0)[:, 0, 0, 0]


def rescue(job: Job) -> dict[str, Any]:
    """Steps until the output is there, for each cell; None = not within `most` steps."""
    torch.set_num_threads(1)
    gap_c, value_c, rate_c = (
        torch.tensor(column, dtype=torch.float64) for column in zip(*cells(job.optimizer), strict=True)
    )
    scores = torch.zeros(len(gap_c), KEYS, dtype=torch.float64)
    scores[:, 1] = gap_c
    first, second = torch.zeros_like(scores), torch.zeros_like(scores)
    steps: list[int | None] = [None] * len(gap_c)
    start: list[float] = []
    for step in range(job.most + 1):
        asked = scores.clone().requires_grad_()
        out_c = output(job.method, asked, value_c)
        error_c = out_c / value_c - 0.5
        if step == 0:
            start = (out_c / value_c).tolist()
        for cell in torch.nonzero(error_c.detach().abs() <= WITHIN).flatten().tolist():
            steps[cell] = step if steps[cell] is None else steps[cell]
        if None not in steps or step == job.most:
            break
        (gradient,) = torch.autograd.grad(error_c.square().sum(), asked)
        if job.optimizer == "adam":
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient.square()
            ahead = first / (1 - 0.9 ** (step + 1))
            gradient = ahead / ((second / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
        scores = scores - rate_c[:, None] * gradient
    return {
        "method": job.method,
        "optimizer": job.optimizer,
        "most": job.most,
        "cells": [
            {"gap": gap, "value": value, "rate": rate, "steps": found, "start": begun}
            for (gap, value, rate), found, begun in zip(cells(job.optimizer), steps, start, strict=True)
        ],
    }


def steps_of(run: dict[str, Any], gap: float, value: float, rate: float | None) -> int | None:
    """Of one cell; with rate None, the fewest over the grid. None = not reached."""
    found = [
        cell["steps"]
        for cell in run["cells"]
        if (cell["gap"], cell["value"]) == (gap, value) and rate in (None, cell["rate"]) and cell["steps"] is not None
    ]
    return min(found) if found else None


def page(runs: Sequence[dict[str, Any]]) -> list[str]:
    """One table for each optimizer; the rate is the best of the grid, and for descent 1 as well."""
    by_key = {(run["method"], run["optimizer"]): run for run in runs}
    if any(job.key not in by_key for job in jobs()):
        return ["Saturation: not finished."]
    most = runs[0]["most"]
    lines = [
        f'Steps until the output is within a tenth of v/2, at most {most:,} ("not" = not reached).',
    ]
    views: tuple[tuple[str, str, float | None], ...] = (
        ("plain descent, rate 1", "descent", 1.0),
        (f"plain descent, best rate of {_rates('descent')}", "descent", None),
        (f"Adam, best rate of {_rates('adam')}", "adam", None),
    )
    for title, optimizer, rate in views:
        lines += ["", f"**{title[:1].upper()}{title[1:]}**", ""]
        lines.append("| method | " + " | ".join(f"g={gap:g}, v={v:g}" for gap in GAPS for v in VALUES) + " |")
        lines.append("|---" * (1 + len(GAPS) * len(VALUES)) + "|")
        for method in METHODS:
            run = by_key[method, optimizer]
            row = [steps_of(run, gap, value, rate) for gap in GAPS for value in VALUES]
            lines.append(f"| {method} | " + " | ".join("not" if s is None else f"{s:,}" for s in row) + " |")
    starts = {
        method: [
            next(c["start"] for c in by_key[method, "descent"]["cells"] if (c["gap"], c["value"]) == (gap, value))
            for gap in GAPS
            for value in VALUES
        ]
        for method in ("softmax", "LASER")
    }
    lines += ["", "Where the output stands before the first step, as a share of v (0.5 is asked for):", ""]
    lines.append("| method | " + " | ".join(f"g={gap:g}, v={v:g}" for gap in GAPS for v in VALUES) + " |")
    lines.append("|---" * (1 + len(GAPS) * len(VALUES)) + "|")
    lines += [f"| {m} | " + " | ".join(f"{s:.2g}" for s in row) + " |" for m, row in starts.items()]
    return [*lines, "", *(f"- {line}" for line in judge(runs))]


def judge(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Each claim as it came out."""
    by_key = {(run["method"], run["optimizer"]): run for run in runs}
    lines = []
    for title, optimizer, rate in (
        ("plain descent at rate 1", "descent", 1.0),
        ("plain descent, each at its best rate", "descent", None),
        ("Adam, each at its best rate", "adam", None),
    ):
        counts = {}
        for method in METHODS:
            if method == "softmax":
                continue
            fewer = more = 0
            for gap in GAPS:
                for value in VALUES:
                    own = steps_of(by_key[method, optimizer], gap, value, rate)
                    base = steps_of(by_key["softmax", optimizer], gap, value, rate)
                    a, b = (float("inf") if s is None else s for s in (own, base))
                    fewer, more = fewer + (a < b), more + (a > b)
            counts[method] = (fewer, more)
        total = len(GAPS) * len(VALUES)
        lines.append(
            f"{title}, against softmax in {total} cells: "
            + "; ".join(f"{m} sooner in {fewer}, later in {more}" for m, (fewer, more) in counts.items())
        )
    return [*lines, *(_worst(by_key, optimizer) for optimizer in RATES)]


def _worst(by_key: dict[tuple[str, str], dict[str, Any]], optimizer: str) -> str:
    """The slowest cell of softmax and of LASER, each at its best rate, and softmax's steps over LASER's."""
    words = []
    found: dict[str, list[int | None]] = {}
    for method in ("softmax", "LASER"):
        steps = [steps_of(by_key[method, optimizer], gap, value, None) for gap in GAPS for value in VALUES]
        missed = steps.count(None)
        slowest = max((s for s in steps if s is not None), default=0)
        words.append(f"{method} misses {missed} of {len(steps)}" if missed else f"{method} {slowest:,}")
        found[method] = steps
    times = sorted(
        a / max(b, 1) for a, b in zip(found["softmax"], found["LASER"], strict=True) if a is not None and b is not None
    )
    name = {"descent": "plain descent", "adam": "Adam"}[optimizer]
    line = f"{name}, steps in the slowest cell, each at its best rate: {', '.join(words)}"
    if not times:
        return line
    return f"{line}; softmax takes {times[0]:.1f} to {times[-1]:.1f} times LASER's steps, median {median(times):.1f}"


def _rates(optimizer: str) -> str:
    return ", ".join(f"{rate:g}" for rate in RATES[optimizer])
