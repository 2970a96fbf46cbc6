"""Channel-wise prefix maximum: what log(A exp(V)) can say that A V cannot, with controls.

    y_t,j = max over s <= t of x_s,j            x [T, 8] from N(0, 1)

One causal attention layer of linear maps, q = W_q x + b_q, k, v and o alike, no norm, no positions, no feed-forward;
the output matrix and its bias are the same in every arm. One head reads all 8 channels with one row of weights, so a
mean under these weights cannot pick the largest of each channel; with a head for every channel it can come near, and
that control is here too. Legend: b batch, t tokens, d channels, h heads.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.compare.plan import TUNING_SEED
from clearhead.compare.verdict import Comparison
from experiments import equal_rate
from experiments.running import mean_half

CHANNELS, TOKENS, BATCH, STEPS = 8, 16, 64, 600
LENGTHS = (8, 16, 32, 64, 128)
"""Scored on; trained on `TOKENS` alone."""
RATES = (1e-2, 3e-2, 1e-1)
SEEDS, TUNING_SEEDS = 6, 2
STREAMS = 256
"""Fresh streams of each length that a run is scored on."""


@dataclass(frozen=True)
class Arm:
    """How one layer attends. `values` multiplies V before it is read; `learned` puts one learned scalar on queries."""

    read: str = "softmax"
    heads: int = 1
    values: float = 1.0
    learned: bool = False


ARMS = {
    "softmax": Arm(),
    "softmax, learned temperature": Arm(learned=True),
    "softmax, values x 4": Arm(values=4.0),
    "softmax, 8 heads": Arm(heads=8),
    "LASER": Arm("laser"),
    "LASER, learned temperature": Arm("laser", learned=True),
    "LASER, values x 4": Arm("laser", values=4.0),
    "LASER, values / 4": Arm("laser", values=0.25),
    "LASER, 8 heads": Arm("laser", heads=8),
}
BASELINE = "softmax"


class Layer(nn.Module):
    """One causal attention layer, [b, t, d] -> [b, t, d]. Parameters start alike in every arm of a seed."""

    def __init__(self, arm: Arm, seed: int) -> None:
        super().__init__()
        self.arm = arm
        torch.manual_seed(seed)
        self.query, self.key, self.value, self.output = (nn.Linear(CHANNELS, CHANNELS) for _ in range(4))
        self.temperature = nn.Parameter(torch.ones(())) if arm.learned else None

    def forward(self, x_btd: Tensor) -> Tensor:
        """See the class."""
        q_bhte, k_bhte, v_bhte = (
            one(x_btd).unflatten(-1, (self.arm.heads, -1)).transpose(1, 2) for one in (self.query, self.key, self.value)
        )
        if self.temperature is not None:
            q_bhte = q_bhte * self.temperature
        out_bhte = attend(q_bhte, k_bhte, self.arm.values * v_bhte, self.arm.read, mask=Mask.causal()).out
        return self.output(out_bhte.transpose(1, 2).flatten(2))


@dataclass(frozen=True)
class Job:
    """One run; a seed from `TUNING_SEED` on only helps to choose the rate."""

    arm: str
    rate: float
    seed: int
    steps: int = STEPS

    @property
    def key(self) -> tuple[str, float, int]:
        """What tells it from all others."""
        return (self.arm, self.rate, self.seed)


def tuning_jobs(*, quick: bool = False) -> list[Job]:
    """Every arm at every rate, on seeds that the verdict never sees."""
    arms, rates, seeds, steps = (
        (list(ARMS)[:5:4], RATES[:2], 1, 5) if quick else (list(ARMS), RATES, TUNING_SEEDS, STEPS)
    )
    return [Job(arm, rate, TUNING_SEED + seed, steps) for seed in range(seeds) for rate in rates for arm in arms]


def chosen_rates(runs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """For each arm the rate with the lowest mean error on the tuning seeds; one with a diverged run does not count."""
    found: dict[str, float] = {}
    tuning = [run for run in runs if run["seed"] >= TUNING_SEED]
    for arm in dict.fromkeys(run["arm"] for run in tuning):
        means: dict[float, float] = {}
        for rate in {run["rate"] for run in tuning if run["arm"] == arm}:
            errors = [run["error"] for run in tuning if (run["arm"], run["rate"]) == (arm, rate)]
            means[rate] = math.inf if None in errors else sum(errors) / len(errors)
        found[arm] = min(means, key=lambda rate: (means[rate], rate))
    return found


def final_jobs(runs: Sequence[Mapping[str, Any]], seeds: int, *, quick: bool = False) -> list[Job]:
    """Every arm at its own rate."""
    steps = 5 if quick else STEPS
    return [
        Job(arm, rate, seed, steps) for seed in range(2 if quick else seeds) for arm, rate in chosen_rates(runs).items()
    ]


def train_one(job: Job) -> dict[str, Any]:
    """Train with Adam, a cosine to 0; score fresh streams of every length. `error` is None for a run that diverged."""
    torch.set_num_threads(1)
    began = time.process_time()
    layer = Layer(ARMS[job.arm], job.seed)
    optimizer = torch.optim.Adam(layer.parameters(), lr=job.rate)
    generator = torch.Generator().manual_seed(10_000 + job.seed)
    diverged = False
    for step in range(job.steps):
        x_btd = torch.randn(BATCH, TOKENS, CHANNELS, generator=generator)
        loss = (layer(x_btd) - x_btd.cummax(dim=1).values).square().mean()
        if not bool(loss.isfinite()):
            diverged = True
            break
        optimizer.param_groups[0]["lr"] = job.rate * 0.5 * (1 + math.cos(math.pi * step / job.steps))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    errors = None if diverged else {str(tokens): _score(layer, job.seed, tokens) for tokens in LENGTHS}
    error = None if errors is None or not math.isfinite(errors[str(TOKENS)]) else errors[str(TOKENS)]
    with torch.no_grad():
        x_btd = torch.randn(64, TOKENS, CHANNELS, generator=torch.Generator().manual_seed(0))
        spread = float((layer.arm.values * layer.value(x_btd)).std(dim=(0, 1)).mean())
    return {
        "arm": job.arm,
        "rate": job.rate,
        "seed": job.seed,
        "steps": job.steps,
        "error": error,
        "by_length": errors if error is not None else None,
        "value_spread": spread if math.isfinite(spread) else None,
        "temperature": None if layer.temperature is None else float(layer.temperature.detach()),
        "cpu_seconds": time.process_time() - began,
    }


@torch.no_grad()
def _score(layer: Layer, seed: int, tokens: int) -> float:
    """Mean squared error over all places of fresh streams."""
    x_btd = torch.randn(STREAMS, tokens, CHANNELS, generator=torch.Generator().manual_seed(20_000 + seed))
    return float((layer(x_btd) - x_btd.cummax(dim=1).values).square().mean())


@lru_cache
def constant_error(tokens: int) -> float:
    """Error of the best guess that knows the place alone: the mean over places of the maximum's variance."""
    x_btd = torch.randn(4_000, tokens, CHANNELS, generator=torch.Generator().manual_seed(1))
    return float(x_btd.cummax(dim=1).values.var(dim=0).mean())


def summary(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each arm over the seeds of the verdict, and against softmax."""
    rates = chosen_rates(runs)
    final = _final(runs, rates)
    compared = _compared(runs)
    if not compared:
        return []
    rows = []
    for arm, rate in rates.items():
        own = [run for run in final if run["arm"] == arm]
        finished = [run for run in own if run["error"] is not None]
        found = compared.get(arm)
        rows.append(
            {
                "arm": arm,
                "rate": rate,
                "seeds": len(own),
                "finished": len(finished),
                "error": list(mean_half([run["error"] for run in finished])) if finished else None,
                "low": min((run["error"] for run in finished), default=None),
                "high": max((run["error"] for run in finished), default=None),
                "by_length": {
                    str(tokens): list(mean_half([run["by_length"][str(tokens)] for run in finished]))
                    for tokens in LENGTHS
                }
                if finished
                else None,
                "range_by_length": _ranges(finished),
                "value_spread": mean_half([run["value_spread"] for run in finished])[0] if finished else None,
                "difference": None if found is None else found.mean,
                "interval": None
                if found is None or found.interval is None
                else [found.interval.low, found.interval.high],
                "verdict": "baseline" if found is None else str(found.verdict),
                "equal_rate": None if found is None else equal_rate.plain(found.equal_rate),
                "sentence": None if found is None else found.sentence,
                "cpu_seconds": mean_half([run["cpu_seconds"] for run in own])[0],
            }
        )
    return rows


def _ranges(finished: Sequence[Mapping[str, Any]]) -> dict[str, list[float]] | None:
    """Lowest and highest error over seeds, by length."""
    if not finished:
        return None
    errors = {str(tokens): [run["by_length"][str(tokens)] for run in finished] for tokens in LENGTHS}
    return {tokens: [min(values), max(values)] for tokens, values in errors.items()}


def _final(runs: Sequence[Mapping[str, Any]], rates: Mapping[str, float]) -> list[Mapping[str, Any]]:
    """The runs that count."""
    return [run for run in runs if run["seed"] < TUNING_SEED and run["rate"] == rates.get(run["arm"])]


def _compared(runs: Sequence[Mapping[str, Any]]) -> dict[str, Comparison]:
    """Every other arm against softmax; empty where nothing counts yet."""
    rates = chosen_rates(runs)
    seeds = sorted({run["seed"] for run in _final(runs, rates)})
    if BASELINE not in rates or not seeds:
        return {}
    judged = [
        equal_rate.Run(run["arm"], run["rate"], run["seed"], _status(run["error"]), run["error"])
        for run in runs
        if run["seed"] < TUNING_SEED
    ]
    others = [arm for arm in rates if arm != BASELINE]
    return equal_rate.Ledger(judged, rates, seeds).against(BASELINE, others, unit="mean squared error")


def equal_rate_jobs(runs: Sequence[Mapping[str, Any]], *, quick: bool = False) -> list[Job]:
    """The runs at one rate that a verdict between different ones waits for."""
    seeds = sorted({run["seed"] for run in _final(runs, chosen_rates(runs))})
    return [
        Job(arm, rate, seed, 5 if quick else STEPS)
        for arm, rate in equal_rate.wanted(_compared(runs).values())
        for seed in seeds
    ]


def _status(error: float | None) -> str:
    return "diverged" if error is None else "finished"


def page(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tables."""
    if not rows:
        return ["Prefix maximum: not finished."]
    lines = [
        f"Mean squared error after {STEPS} steps on {TOKENS} tokens; the best guess from the place alone has "
        f"{constant_error(TOKENS):.3f}.",
        "",
        "| arm | rate chosen | seeds | error | lowest, highest | less softmax, simultaneous 95 % | verdict "
        "| std of what is read |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        done = f"{row['finished']} of {row['seeds']}"
        rate = f"{row['rate']:g}{' (edge)' if row['rate'] in (RATES[0], RATES[-1]) else ''}"
        if row["error"] is None:
            lines.append(f"| {row['arm']} | {rate} | {done} | diverged | | | {row['verdict']} | |")
            continue
        verdict = equal_rate.words(row["verdict"], row["equal_rate"])
        against = "" if row["difference"] is None else f"{row['difference']:+.4f}"
        if row["interval"] is not None:
            against += f" [{row['interval'][0]:+.4f}, {row['interval'][1]:+.4f}]"
        lines.append(
            f"| {row['arm']} | {rate} | {done} | {_pm(row['error'])} | {row['low']:.4f}, {row['high']:.4f} "
            f"| {against} | {verdict} | {row['value_spread']:.2f} |"
        )
    lines += ["", "| error at a length of | " + " | ".join(map(str, LENGTHS)) + " |", "|---" * (1 + len(LENGTHS)) + "|"]
    for row in rows:
        if row["by_length"] is not None:
            cells = " | ".join(_pm(row["by_length"][str(tokens)]) for tokens in LENGTHS)
            lines.append(f"| {row['arm']} | {cells} |")
    constant = " | ".join(f"{constant_error(tokens):.3f}" for tokens in LENGTHS)
    return [*lines, f"| the place alone | {constant} |", "", *(f"- {line}" for line in judge(rows))]


def judge(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sentences of the comparison, and what was fixed beforehand: LASER below 0.05, softmax above 0.25."""
    by_arm = {row["arm"]: row for row in rows}
    lines = []
    laser, plain = by_arm.get("LASER"), by_arm.get(BASELINE)
    if laser and plain and laser["error"] and plain["error"]:
        holds = laser["finished"] == laser["seeds"] and laser["high"] < 0.05 and plain["low"] > 0.25
        lines.append(
            f"one head: LASER's worst seed {laser['high']:.4f} (asked: below 0.05), softmax's best seed "
            f"{plain['low']:.4f} (asked: above 0.25): {'holds' if holds else 'fails'}"
        )
    heads = by_arm.get("softmax, 8 heads")
    if laser and heads and laser["error"] and heads["error"]:
        lines.append(
            f"a head for every channel, as many parameters: softmax's worst seed {heads['high']:.4f}, LASER's best "
            f"seed with one head {laser['low']:.4f}: only LASER can do the task: "
            f"{'refuted' if heads['high'] < laser['low'] and heads['finished'] == heads['seeds'] else 'stands'}"
        )
    return [*lines, *(row["sentence"] for row in rows if row["sentence"])]


def _pm(pair: Sequence[float | None]) -> str:
    mean, half = pair
    return f"{mean:.4f}" if half is None else f"{mean:.4f} ± {half:.4f}"
