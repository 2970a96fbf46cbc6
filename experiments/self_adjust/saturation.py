"""How saturated attention is in the models of `text`, and whether gradient spikes follow 1 / D.

`final` looks at every trained model on the same validation windows; `traced` trains some of them again, as before to
the bit, and looks at each step's own batch through `clearhead.attention.observe`. Rows that see fewer than `WIDE` keys
are left out of every share: the first rows of a text are saturated whatever they score.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from clearhead.attention.call import Call
from clearhead.attention.observe import watching
from clearhead.attention.reference import DENSE_WEIGHTS, softmax_weights, visible_scores
from clearhead.attention.spec import SelfAdjust, Softmax
from clearhead.attention.terms import Rows
from clearhead.compare.costs import run_config
from clearhead.compare.layout import Layout
from clearhead.compare.plan import ComparePlan
from clearhead.compare.records import load_record, read_metrics
from clearhead.compare.statistics import SPIKE_FACTOR, SPIKE_MIN_HISTORY, SPIKE_WINDOW
from clearhead.compare.verdict import Status
from clearhead.data.text import prepare
from clearhead.models.io import load_model
from clearhead.train.checkpoint import newest_model
from clearhead.train.config import RunConfig
from clearhead.train.loop import train
from experiments.running import mean_half, read_runs, run_missing
from experiments.self_adjust.arms import BASELINE, DEFAULT, DETACHED, use_controls
from experiments.self_adjust.text import FORMS_PLAN, LONG_PLAN

WIDE = 8
"""Keys that a row must see to count."""
WINDOWS = 32
TRACED, TRACED_SEEDS = (BASELINE, "product", DEFAULT, DETACHED), 3
BINS = 24
TOP_GRADIENTS, TOP_INVERSE = 0.01, 0.1
FIELDS = ("above_90", "above_99", "positive", "entropy", "row_sum", "row_sum_sd", "score_sd")
NAME, RUNS = "saturation.json", "traced.jsonl"


@torch.no_grad()
def look(call: Call) -> dict[str, Tensor]:
    """Of every row of a call, [b, h, n]: what softmax does with its scores, and the mechanism's row sum and 1 / D."""
    n, m = call.sizes[3:]
    rows = Rows(torch.arange(n), torch.arange(m), call.mask.resolved_offset())
    x, visible = visible_scores(call.q, call.k, call.mask, call.bias, call.scale, rows)
    count = visible.sum(-1)
    s = softmax_weights(Softmax(), x, visible)
    choice = call.spec.weights
    mean = (x * visible).sum(-1) / count
    low = x.masked_fill(~visible, float("inf")).amin(-1)
    high = x.masked_fill(~visible, float("-inf")).amax(-1)
    found = {
        "count": count.expand(s.shape[:3]),
        "largest": s.amax(-1),
        "positive": high > 0,
        "entropy": -torch.special.xlogy(s, s).sum(-1) / count.log().clamp_min(1e-9),
        "row_sum": DENSE_WEIGHTS[type(choice)](choice, x, visible).sum(-1),
        "score_sd": (((x - mean[..., None]) * visible).square().sum(-1) / count).sqrt(),
    }
    whole = getattr(choice, "whole", choice)
    if isinstance(whole, SelfAdjust) and whole.form in ("minmax", "range"):
        if whole.form == "range":
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        found["inverse"] = 1.0 / (high - low).clamp_min(1e-10)
    return found


def summary(rows: Mapping[str, Tensor]) -> dict[str, float]:
    """The `FIELDS` over rows that see at least `WIDE` keys; shares of them, and of those above .9 for `positive`."""
    wide = rows["count"] >= WIDE
    largest = rows["largest"][wide]
    above = largest > 0.9
    sums = rows["row_sum"][wide]
    return {
        "above_90": float(above.double().mean()),
        "above_99": float((largest > 0.99).double().mean()),
        "positive": float(rows["positive"][wide][above].double().mean()) if above.any() else float("nan"),
        "entropy": float(rows["entropy"][wide].mean()),
        "row_sum": float(sums.mean()),
        "row_sum_sd": float(sums.std()),
        "score_sd": float(rows["score_sd"][wide].mean()),
    }


# ---- the trained models ----


def final(folder: Path) -> dict[str, Any]:
    """By arm, layer by layer: the mean of each field over seeds and half its interval; over finished runs."""
    use_controls()
    found = _final(folder / FORMS_PLAN)
    if (folder / LONG_PLAN / "plan.json").exists():
        found |= {f"{name}, {LONG_PLAN}": layers for name, layers in _final(folder / LONG_PLAN).items()}
    return found


def _final(folder: Path) -> dict[str, Any]:
    plan, layout = ComparePlan.load(folder), Layout(folder)
    batch = prepare(plan.base.data).batch("val", WINDOWS, plan.base.data.context, 0, 0)
    tokens, segments = torch.from_numpy(batch.tokens), torch.from_numpy(batch.segments)
    found = {}
    for arm in plan.arms:
        runs = []
        for seed in plan.seeds:
            record = load_record(layout.run(arm, seed), arm.name, seed)
            if record.status is Status.FINISHED:
                runs.append(_layers(load_model(newest_model(record.folder)), tokens, segments))
        if runs:
            found[arm.name] = [
                {field: _over_seeds([one[layer][field] for one in runs]) for field in FIELDS}
                for layer in range(len(runs[0]))
            ]
    return found


def _layers(model: Any, tokens: Tensor, segments: Tensor) -> list[dict[str, float]]:
    layers: list[dict[str, float]] = []
    with watching(lambda call: layers.append(summary(look(call)))), torch.no_grad():
        model(tokens, segments=segments)
    return layers


def _over_seeds(values: Sequence[float]) -> tuple[float | None, float | None]:
    known = [value for value in values if np.isfinite(value)]
    return mean_half(known) if known else (None, None)


# ---- while they train ----


@dataclass(frozen=True)
class Job:
    """One run that is looked at in every step."""

    arm: str
    seed: int
    config: str
    """The run's configuration as JSON."""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this run: a changed configuration is another one."""
        return (self.arm, self.seed, self.config)


def key_of_run(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """See `Job.key`."""
    return (run["arm"], run["seed"], run["config"])


def jobs(folder: Path, *, seeds: int, quick: bool) -> list[Job]:
    """The same runs as in the comparison below `folder`, at the rates that were chosen there."""
    use_controls()
    plan, layout = ComparePlan.load(folder / FORMS_PLAN), Layout(folder / FORMS_PLAN)
    made = []
    for seed in plan.seeds[: 1 if quick else min(seeds, TRACED_SEEDS)]:
        for arm in plan.arms:
            if arm.name in TRACED and not (quick and arm.name == BASELINE):
                rate = load_record(layout.run(arm, seed), arm.name, seed).learning_rate
                config = run_config(arm.apply(plan.base), steps=plan.base.total_steps, seed=seed, rate=rate)
                made.append(Job(arm.name, seed, json.dumps(config.to_dict(), sort_keys=True)))
    return made


class Watcher:
    """Shown every call; keeps those of training steps, in order of layers."""

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self.fields: list[dict[str, float]] = []
        self.inverse: list[tuple[float, int]] = []
        """Of each call the largest 1 / D and the number of keys that its row sees."""

    def __call__(self, call: Call) -> None:
        if not torch.is_grad_enabled():  # an evaluation
            return
        rows = look(call)
        self.fields.append(summary(rows))
        if "inverse" in rows:
            place = int(rows["inverse"].argmax())
            self.inverse.append((float(rows["inverse"].flatten()[place]), int(rows["count"].flatten()[place])))

    def steps(self) -> np.ndarray:
        """[steps, layers, fields]."""
        table = np.array([[one[field] for field in FIELDS] for one in self.fields])
        return table.reshape(-1, self.layers, len(FIELDS))


def trace(job: Job) -> dict[str, Any]:
    """Train one arm again and look at every step."""
    torch.set_num_threads(1)
    config = RunConfig.from_dict(json.loads(job.config))
    watcher = Watcher(int(config.model.layers))  # type: ignore[union-attr]
    began = time.process_time()
    with tempfile.TemporaryDirectory() as scratch, watching(watcher):
        ended = train(config, Path(scratch) / "run", progress=False)
        curve, _, _ = read_metrics(Path(scratch) / "run" / "metrics.jsonl")
    table = watcher.steps()
    cut = np.array_split(np.arange(len(table)), min(BINS, len(table)))
    return {
        "arm": job.arm,
        "seed": job.seed,
        "config": job.config,
        "status": ended.status,
        "val": ended.summary["val_bits_per_byte"],
        "steps": [float(part.mean() + 1) for part in cut],
        "layers": [
            {field: [_mean(table[part, layer, index]) for part in cut] for index, field in enumerate(FIELDS)}
            for layer in range(watcher.layers)
        ],
        "spikes": spikes(curve["grad_norm"], watcher),
        "cpu_seconds": round(time.process_time() - began, 1),
    }


def _mean(values: np.ndarray) -> float | None:
    known = values[np.isfinite(values)]
    return round(float(known.mean()), 6) if known.size else None


def spikes(norms: np.ndarray, watcher: Watcher) -> dict[str, Any] | None:
    """Whether large gradient norms come with a large 1 / D; None for an arm that has no D.

    A step's excess is its norm over the median of the (up to 100) norms before it. Of the `TOP_GRADIENTS` largest
    excesses: the share whose 1 / D is among the `TOP_INVERSE` largest (so much is chance), and Spearman's correlation
    of all excesses with 1 / D.
    """
    if not watcher.inverse:
        return None
    pairs = np.array(watcher.inverse).reshape(-1, watcher.layers, 2)
    inverse, layer = pairs[:, :, 0].max(axis=1), pairs[:, :, 0].argmax(axis=1)
    keys = pairs[np.arange(len(pairs)), layer, 1]
    first = min(SPIKE_MIN_HISTORY, len(norms) - 1)
    excess = np.array([norms[i] / np.median(norms[max(0, i - SPIKE_WINDOW) : i]) for i in range(first, len(norms))])
    inverse, keys = inverse[first:], keys[first:]
    top = np.argsort(-excess)[: max(1, round(TOP_GRADIENTS * len(excess)))]
    bound = np.quantile(inverse, 1 - TOP_INVERSE)
    correlation = float(stats.spearmanr(excess, inverse).statistic) if len(excess) > 2 else float("nan")
    return {
        "largest_norm": float(norms.max()),
        "median_norm": float(np.median(norms)),
        "spikes": int((excess > SPIKE_FACTOR).sum()),
        "largest_inverse": float(inverse.max()),
        "median_inverse": float(np.median(inverse)),
        "median_keys": float(np.median(keys)),
        "correlation": correlation if np.isfinite(correlation) else None,
        "top_share": float((inverse[top] >= bound).mean()),
    }


def run(folder: Path, out: Path, *, seeds: int, workers: int, quick: bool) -> None:
    """Look at what `text` left below `folder`, and write it into `out`."""
    path = out / RUNS
    run_missing(
        path,
        jobs(folder, seeds=seeds, quick=quick),
        trace,
        key_of_job=lambda job: job.key,
        key_of_run=key_of_run,
        workers=workers,
    )
    traced = [{key: value for key, value in one.items() if key != "config"} for one in read_runs(path)]
    (out / NAME).write_text(json.dumps({"final": final(folder), "traced": traced}, indent=1) + "\n")


def read(out: Path) -> dict[str, Any] | None:
    """What `run` found; None before the first run."""
    path = out / NAME
    return json.loads(path.read_text()) if path.exists() else None
