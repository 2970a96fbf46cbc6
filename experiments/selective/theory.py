"""Dilution by arithmetic: what becomes of attention when the scores stay as they are and the keys become more.

Three kinds of fixed scores, each with its formula and its measurement by the package's own `attend` and `PositionPart`:

- needle: one key has the score s, the others 0.  w = 1 / (1 + (n-1) e^(-tau s))
- bound: unit-norm tokens and an operator norm W; the best case, the target at +W and the others at -W, is the paper's
  bound  w = 1 / (1 + (n-1) e^(-2 tau W)),  and random tokens stay below it
- noise: scores from N(0, 1).  entropy = ln n - tau^2 / 2  while tau < sqrt(2 ln n), and then it is gone

with tau = 1 + slope ln n, or 1. So a needle's weight falls to 0 while slope * s < 1, stays at 1 / (1 + e^(-s)) at 1,
and rises to 1 above.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.selective import Temperatures
from clearhead.layers.temperature import PositionPart

LENGTHS = (16, 64, 256, 1024, 4096, 16384)
SCORE, NORM = 4.0, 1.5
SLOPES = (0.0, 0.125, 0.25, 0.5)
"""Times `SCORE`: 0, a half, one and two."""
DRAWS = 16
"""Rows of random scores at each length."""


def temperature(n: int, slope: float) -> Tensor:
    """tau of a query that sees n keys, by the package's module."""
    part = PositionPart("linear").double()
    with torch.no_grad():
        part.slope.fill_(slope)
        return 1.0 + part(torch.tensor([[[n]]]))


def needle_weight(n: int, score: float, tau: float) -> float:
    """The target's weight beside n - 1 keys whose scores are `score` lower."""
    return 1.0 / (1.0 + (n - 1) * math.exp(-tau * score))


def needle_entropy(n: int, score: float, tau: float) -> float:
    """The entropy of the same row, in nats."""
    w = needle_weight(n, score, tau)
    rest = 1.0 - w
    return -w * math.log(w) - (rest * math.log(rest / (n - 1)) if rest > 0.0 else 0.0)


def needed_norm(n: int) -> float:
    """The operator norm from which the bound allows a weight of one half."""
    return 0.5 * math.log(n - 1)


def noise_entropy(n: int, tau: float) -> float:
    """The entropy of many scores from N(0, 1); 0 where so sharp a row hangs on its few largest scores."""
    return math.log(n) - tau**2 / 2 if tau < math.sqrt(2 * math.log(n)) else 0.0


def measured(scores_bn: Tensor, slope: float) -> dict[str, float]:
    """Largest weight and entropy of rows with these scores, by `attend`, means over rows."""
    b, n = scores_bn.shape
    # A query of 1 and keys that are the scores: the temperature reaches them as it does in a model.
    query, key = torch.ones(b, 1, 1, 1, dtype=scores_bn.dtype), scores_bn[:, None, :, None]
    tau = temperature(n, slope)[..., None]
    found = attend(
        query,
        key,
        torch.ones_like(key),
        "softmax+selective",
        temperatures=Temperatures(query=tau),
        scale=1.0,
        want=("max_weight", "entropy"),
    ).extras
    return {name: float(found[name].mean()) for name in ("max_weight", "entropy")}


def needle_scores(n: int) -> Tensor:
    """One row."""
    scores = torch.zeros(1, n, dtype=torch.float64)
    scores[0, n // 2] = SCORE
    return scores


def extreme_scores(n: int) -> Tensor:
    """The bound's best case."""
    scores = torch.full((1, n), -NORM, dtype=torch.float64)
    scores[0, n // 2] = NORM
    return scores


def token_scores(n: int, generator: torch.Generator, width: int = 16) -> Tensor:
    """q W k of random unit tokens, the query being one of them, with W = `NORM` times the identity."""
    key = torch.randn(DRAWS, n, width, dtype=torch.float64, generator=generator)
    key = key / key.norm(dim=-1, keepdim=True)
    return NORM * (key @ key[:, :1].transpose(1, 2))[..., 0]


def table() -> list[dict[str, Any]]:
    """Every kind, length and slope: what the formula says and what was measured."""
    rows = []
    generator = torch.Generator().manual_seed(0)
    for n in LENGTHS:
        tokens = token_scores(n, generator)
        noise = torch.randn(DRAWS, n, dtype=torch.float64, generator=generator)
        for slope in SLOPES:
            tau = float(temperature(n, slope))
            bound = needle_weight(n, 2 * NORM, tau)
            formulas = {
                "needle": (needle_scores(n), needle_weight(n, SCORE, tau), needle_entropy(n, SCORE, tau)),
                "bound, best case": (extreme_scores(n), bound, needle_entropy(n, 2 * NORM, tau)),
                "bound, random tokens": (tokens, bound, None),
                "noise": (noise, None, noise_entropy(n, tau)),
            }
            for kind, (scores, weight, entropy) in formulas.items():
                said = {"max_weight": weight, "entropy": entropy}
                rows.append(
                    {"kind": kind, "n": n, "slope": slope, "tau": tau, "formula": said} | measured(scores, slope)
                )
    return rows
