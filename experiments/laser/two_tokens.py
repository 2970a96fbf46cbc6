"""How LASER's gradient to a score compares with softmax's: two tokens by formula, many tokens by count.

Two tokens of values v1 and v2, D = v1 - v2, the first with weight a. With S the score of the first,

    softmax   dO/dS = a (1 - a) D
    LASER     dO/dS = a (1 - a) (e^D - 1) / (a e^D + 1 - a)
    ratio     r(a, D) = (e^D - 1) / (D (a e^D + 1 - a)),   1 where   a* = 1/D - 1/(e^D - 1)

so LASER's gradient is the larger one below a* and the smaller one above it. Every gradient here is autograd's through
the library's own functions; the formulas stand beside it. For D < 0 the tokens change places: r(a, -D) = r(1 - a, D).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy import optimize
from torch import Tensor

from clearhead.attention.attend import attend

DISTANCES = (1.0, 2.0, 4.0, 8.0)
GRID = 199
"""Weights a, evenly over (0, 1), and as many again by powers of ten down to 1e-6."""
BACKENDS = ("sdpa", "chunked", "reference")
SPREADS = (0.1, 0.3, 0.64, 1.0, 2.0, 4.0)
"""Standard deviations of the values. 0.64 is a value behind a norm at width 1024 with weights from N(0, 0.02)."""
SCORE_SPREADS = (1.0, 4.0)
KEYS, ROWS = 256, 512
STARVED = 1e-3
"""A weight below this is starved. The paper's figure 1 counts about 80 % of an LLM's weights below it."""


def ratio(a: float, distance: float) -> float:
    """LASER's gradient over softmax's, by the formula."""
    lift = math.expm1(distance)
    return lift / (distance * (a * lift + 1.0))


def crossover(distance: float) -> float:
    """The weight at which the two gradients are equal, by the formula."""
    return 1.0 / distance - 1.0 / math.expm1(distance)


def score_gradients(spec: str, scores_rm: Tensor, values_rm: Tensor, *, backend: str = "auto") -> Tensor:
    """dO/dS of one output channel in r separate rows of m keys, [r, m], by autograd through `attend`.

    Queries are 1 and keys are the scores, so the gradient of a key is that of its score.
    """
    keys = scores_rm[:, None, :, None].clone().requires_grad_()
    ones = torch.ones(len(scores_rm), 1, 1, 1, dtype=scores_rm.dtype)
    out = attend(ones, keys, values_rm[:, None, :, None], spec, scale=1.0, backend=backend).out
    (found,) = torch.autograd.grad(out.sum(), keys)
    return found[:, 0, :, 0]


def measured_ratio(a: Sequence[float], distance: float, *, backend: str = "auto") -> list[float]:
    """LASER's gradient over softmax's at each weight `a`, through the library, in float64."""
    a_r = torch.tensor(a, dtype=torch.float64)
    scores = torch.stack([torch.logit(a_r), torch.zeros_like(a_r)], dim=1)
    values = torch.tensor([distance, 0.0], dtype=torch.float64).expand(len(a_r), 2)
    laser, plain = (score_gradients(spec, scores, values, backend=backend)[:, 0] for spec in ("laser", "softmax"))
    found: list[float] = (laser / plain).tolist()
    return found


@dataclass(frozen=True)
class Job:
    """`law`: two tokens at distance `value`. `crowd`: many tokens whose values have the standard deviation `value`."""

    kind: str
    value: float

    @property
    def key(self) -> tuple[str, float]:
        """What tells it from all others."""
        return (self.kind, self.value)


def jobs(*, quick: bool = False) -> list[Job]:
    """Every distance and every spread."""
    distances, spreads = (DISTANCES[:2], SPREADS[:2]) if quick else (DISTANCES, SPREADS)
    return [Job("law", value) for value in distances] + [Job("crowd", value) for value in spreads]


def measure(job: Job) -> dict[str, Any]:
    """One line of the results."""
    torch.set_num_threads(1)
    found = _law(job.value) if job.kind == "law" else _crowd(job.value)
    return {"kind": job.kind, "value": job.value, **found}


def _law(distance: float) -> dict[str, Any]:
    even = [(i + 1) / (GRID + 1) for i in range(GRID)]
    a = sorted({*even, *(10 ** (-6 + 5 * i / GRID) for i in range(GRID))})
    expected = [ratio(one, distance) for one in a]
    error = {
        backend: max(
            abs(got / want - 1)
            for got, want in zip(measured_ratio(a, distance, backend=backend), expected, strict=True)
        )
        for backend in BACKENDS
    }
    found = measured_ratio(a, distance)
    return {
        "a": a,
        "ratio": found,
        "error": error,
        "crossover": optimize.brentq(lambda one: measured_ratio([one], distance)[0] - 1.0, 1e-6, 1 - 1e-6, xtol=1e-12),
        "crossover_formula": crossover(distance),
        "at": {f"{one:g}": measured_ratio([one], distance)[0] for one in (1e-4, 0.01, 0.1, 0.5, 0.99)},
        "smaller": sum(value < 1 for one, value in zip(a, found, strict=True) if one in set(even)) / GRID,
        "gradient_at_tenth": 0.1 * 0.9 * distance * measured_ratio([0.1], distance)[0],
    }


def _crowd(spread: float) -> dict[str, Any]:
    """Random rows: how often, and by how much, LASER's gradient is the larger one."""
    rows = []
    for score_spread in SCORE_SPREADS:
        generator = torch.Generator().manual_seed(0)
        scores, values = (torch.randn(ROWS, KEYS, dtype=torch.float64, generator=generator) for _ in range(2))
        scores, values = score_spread * scores, spread * values
        weights = scores.softmax(dim=1)
        laser, plain = (score_gradients(spec, scores, values).abs() for spec in ("laser", "softmax"))
        starved = weights < STARVED
        heavy = weights > 0.1
        rows.append(
            {
                "scores": score_spread,
                "starved_share": _mean(starved),
                "larger": _mean(laser > plain),
                "larger_starved": _mean((laser > plain)[starved]),
                "larger_heavy": _mean((laser > plain)[heavy]) if bool(heavy.any()) else None,
                "norm_ratio": float(laser.norm() / plain.norm()),
                "norm_ratio_starved": float(laser[starved].norm() / plain[starved].norm()),
                "offset": float((_read("laser", scores, values) - _read("softmax", scores, values)).mean()),
                "plain_size": float(_read("softmax", scores, values).abs().mean()),
            }
        )
    return {"rows": rows}


def _read(spec: str, scores_rm: Tensor, values_rm: Tensor) -> Tensor:
    ones = torch.ones(len(scores_rm), 1, 1, 1, dtype=scores_rm.dtype)
    return attend(ones, scores_rm[:, None, :, None], values_rm[:, None, :, None], spec, scale=1.0).out[:, 0, 0, 0]


def _mean(which: Tensor) -> float:
    return float(which.double().mean())


def page(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The tables and what follows from them."""
    laws = [run for run in runs if run["kind"] == "law"]
    crowds = [run for run in runs if run["kind"] == "crowd"]
    if not laws or not crowds:
        return ["Two tokens: not finished."]
    lines = [
        "| D = v1 - v2 | a = 1e-4 | 0.01 | 0.1 | 0.5 | 0.99 | equal at a, measured | 1/D - 1/(e^D - 1) "
        "| share of (0, 1) where LASER's is smaller | largest error against the formula, any backend |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for run in laws:
        at = " | ".join(f"{value:.3g}" for value in run["at"].values())
        lines.append(
            f"| {run['value']:g} | {at} | {run['crossover']:.4f} | {run['crossover_formula']:.4f} "
            f"| {run['smaller']:.0%} | {max(run['error'].values()):.0e} |"
        )
    lines += [
        "",
        f"Random rows of {KEYS} keys, scores N(0, s^2), values N(0, v^2): dO/dS of all scores, LASER's over softmax's.",
        "",
        "| s | v | starved weights (below 1e-3) | LASER's is larger: all scores | starved | weight above 0.1 "
        "| norm ratio, all | norm ratio, starved | mean LASER - softmax output | mean size of softmax's output |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for place in range(len(SCORE_SPREADS)):
        for run in crowds:
            row = run["rows"][place]
            heavy = "none" if row["larger_heavy"] is None else f"{row['larger_heavy']:.0%}"
            lines.append(
                f"| {row['scores']:g} | {run['value']:g} | {row['starved_share']:.0%} | {row['larger']:.0%} "
                f"| {row['larger_starved']:.0%} | {heavy} | {row['norm_ratio']:.2f} | {row['norm_ratio_starved']:.2f} "
                f"| {row['offset']:+.3f} | {row['plain_size']:.3f} |"
            )
    return [*lines, "", *(f"- {line}" for line in judge(runs))]


def judge(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Each claim as it came out."""
    laws = {run["value"]: run for run in runs if run["kind"] == "law"}
    worst = max(error for run in laws.values() for error in run["error"].values())
    apart = max(abs(run["crossover"] - run["crossover_formula"]) for run in laws.values())
    lines = [
        f"the formula of the ratio: largest relative error {worst:.0e} over {len(laws)} distances and "
        f"{len(BACKENDS)} backends, crossover off by at most {apart:.0e}: "
        f"{'holds' if worst < 1e-6 and apart < 1e-9 else 'fails'}"
    ]
    smaller = {value: run["at"]["0.5"] for value, run in laws.items()}
    lines.append(
        "LASER's gradient is always the larger one: at a = 0.5 it is "
        + ", ".join(f"{ratio_:.3g} (D = {value:g})" for value, ratio_ in smaller.items())
        + f" times softmax's: {'refuted' if min(smaller.values()) < 1 else 'holds'}"
    )
    far = max(laws)
    if far >= 8:
        found = laws[far]["gradient_at_tenth"]
        lines.append(
            f"one factor saturates and not two, for e^v1 far above e^v2: at D = {far:g}, a = 0.1 the gradient is "
            f"{found:.3f}, the limit 1 - a is 0.900: {'holds' if abs(found - 0.9) < 0.01 else 'fails'}"
        )
    return lines
