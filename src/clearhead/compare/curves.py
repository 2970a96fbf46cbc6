"""Curves over training for the report: means over seeds with their band, thinned to what a plot can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clearhead.compare import statistics as st
from clearhead.compare.records import Record
from clearhead.compare.verdict import Status

BINS = 120
"""Points of a training curve; each is the mean of the steps that fall into it."""


def of_arm(
    runs: Sequence[Record], baseline: Sequence[Record], seconds_per_token: float | None, is_baseline: bool
) -> dict[str, Any]:
    """Return an arm's curves: validation, its paired difference to the baseline, training loss, gradient norm.

    Only finished runs enter, so that every point of a curve is over the same seeds. `seconds` is the number of tokens
    times the speed probe's time per token, because the clock of a run beside other runs is not fair.
    """
    finished = [run for run in runs if run.status is Status.FINISHED]
    base = {run.seed: run for run in baseline if run.status is Status.FINISHED}
    return {
        "validation": _validation(finished, seconds_per_token),
        "difference": None if is_baseline else _difference(finished, base),
        "loss": _binned(finished, "loss"),
        "gradient": _binned_gradient(finished),
    }


def _validation(runs: Sequence[Record], seconds_per_token: float | None) -> dict[str, Any] | None:
    runs = [run for run in runs if "bits" in run.evals]
    if not runs:
        return None
    length = min(len(run.evals["bits"]) for run in runs)
    tokens = runs[0].evals["tokens"][:length]
    mean, low, high = st.mean_band([run.evals["bits"][:length] for run in runs])
    seconds = tokens * seconds_per_token if seconds_per_token is not None else None
    return {"tokens": tokens, "seconds": seconds, "mean": mean, "low": low, "high": high, "seeds": len(runs)}


def _difference(runs: Sequence[Record], base: dict[int, Record]) -> dict[str, Any] | None:
    """Candidate minus baseline at equal progress, on the candidate's evaluations, interpolating the baseline's."""
    pairs = [(run, base[run.seed]) for run in runs if run.seed in base]
    pairs = [(run, other) for run, other in pairs if "bits" in run.evals and "bits" in other.evals]
    if not pairs:
        return None
    length = min(len(run.evals["bits"]) for run, _ in pairs)
    tokens = pairs[0][0].evals["tokens"][:length]
    last = min(float(other.evals["tokens"][-1]) for _, other in pairs)
    first = max(float(other.evals["tokens"][0]) for _, other in pairs)
    keep = (tokens >= first) & (tokens <= last)
    rows = [
        run.evals["bits"][:length][keep] - np.interp(tokens[keep], other.evals["tokens"], other.evals["bits"])
        for run, other in pairs
    ]
    if not keep.any():
        return None
    mean, low, high = st.student_band(rows)
    return {"tokens": tokens[keep], "mean": mean, "low": low, "high": high, "seeds": len(pairs)}


def _bins(run: Record) -> np.ndarray:
    """Return the bin of each logged step."""
    steps = run.train["steps"]
    count = min(BINS, len(steps))
    return np.minimum((np.arange(len(steps)) * count) // len(steps), count - 1)


def _binned(runs: Sequence[Record], name: str) -> dict[str, Any] | None:
    runs = [run for run in runs if name in run.train]
    if not runs:
        return None
    curves = [_mean_by_bin(run.train[name], _bins(run)) for run in runs]
    length = min(map(len, curves))
    tokens = _mean_by_bin(runs[0].train["tokens"], _bins(runs[0]))[:length]
    mean, low, high = st.mean_band([curve[:length] for curve in curves])
    return {"tokens": tokens, "mean": mean, "low": low, "high": high, "seeds": len(runs)}


def _binned_gradient(runs: Sequence[Record]) -> dict[str, Any] | None:
    """The median of the steps in a bin, with the largest beside it: a mean would hide the spikes."""
    runs = [run for run in runs if "grad_norm" in run.train and np.isfinite(run.train["grad_norm"]).any()]
    if not runs:
        return None
    norms = np.stack([run.train["grad_norm"][: min(len(r.train["grad_norm"]) for r in runs)] for run in runs])
    count = min(BINS, norms.shape[1])
    index = np.array_split(np.arange(norms.shape[1]), count)
    tokens = runs[0].train["tokens"]
    return {
        "tokens": [float(tokens[i].mean()) for i in index],
        "median": [float(np.nanmedian(norms[:, i])) for i in index],
        "largest": [float(np.nanmax(norms[:, i])) for i in index],
        "seeds": len(runs),
    }


def _mean_by_bin(values: np.ndarray, bins: np.ndarray) -> np.ndarray:
    finite = np.isfinite(values)
    total = np.bincount(bins[finite], weights=values[finite], minlength=int(bins.max()) + 1)
    count = np.bincount(bins[finite], minlength=int(bins.max()) + 1)
    return total / np.where(count == 0, np.nan, count)


def reach(runs: Sequence[Record], baseline: Sequence[Record], seconds_per_token: float | None) -> dict[str, Any] | None:
    """Return how many tokens, and how much time, each seed needs to reach the baseline's best validation value.

    Seed by seed: the target is the lowest validation value of the baseline's run with the same seed. Both runs are read
    at their evaluations, linear in between. The median is over the seeds that got there, None unless most did.
    """
    base = {run.seed: run for run in baseline if run.status is Status.FINISHED and "bits" in run.evals}
    seeds = []
    for run in runs:
        if run.seed in base and "bits" in run.evals:
            bits, other = base[run.seed].evals["bits"], base[run.seed].evals["tokens"]
            target = float(np.nanmin(bits))
            tokens = st.first_reach(run.evals["tokens"], run.evals["bits"], target)
            own = float(other[int(np.nanargmin(bits))])
            share = tokens / own if tokens is not None else None
            seeds.append({"seed": run.seed, "target": target, "tokens": tokens, "share_of_baseline": share})
    if not seeds:
        return None
    hit = [row for row in seeds if row["tokens"] is not None]
    most = 2 * len(hit) > len(seeds)
    tokens = float(np.median([row["tokens"] for row in hit])) if most else None
    return {
        "per_seed": seeds,
        "reached": len(hit),
        "of": len(seeds),
        "tokens": tokens,
        "share_of_baseline": float(np.median([row["share_of_baseline"] for row in hit])) if most else None,
        "seconds": tokens * seconds_per_token if tokens is not None and seconds_per_token is not None else None,
    }
