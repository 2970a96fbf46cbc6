"""What gradient reaches the scores: Jacobians of the weights, through the package's own attention.

x are m scores of one row, w its weights, J = d w / d x. Everything in float64; sizes are Frobenius norms, medians over
random rows. J is split in two: `row_sum`, the gradient of R = sum_i w_i, and `shares`, the Jacobian of w / R: what the
row attends to, as against how much it attends at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.bias import DenseBias
from clearhead.attention.reference import DENSE_WEIGHTS, EPS
from clearhead.attention.spec import AttentionSpec, SelfAdjust
from experiments.self_adjust.arms import BASELINE, SPECS

KEYS, DRAWS, SPREAD = 8, 32, 0.5
"""Keys of a row, rows, and the standard deviation of their scores before one is put ahead."""
GAPS = tuple(range(0, 25, 2))
QUICK_GAPS = (0, 8, 16, 24)
SHIFT = -35.0
"""Added to every score, so that the largest is below 0 at every gap."""
SMALL_KEYS, SCALES = 64, (1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
ONE_KEY = (1.0, 1e-3, -1.0)
RESCUE_GAPS, RESCUE_STEPS, RESCUED = (2.0, 4.0, 6.0, 8.0), 10_000, 0.25
ALIVE = 1e-3
"""Norm of the Jacobian at a gap of 16 from which on a form counts as alive there; softmax's is near 6e-7."""


def weights(x_rm: Tensor, spec: str) -> Tensor:
    """Weights that a spec gives to rows of scores, [r, m], read off with one-hot values."""
    r, m = x_rm.shape
    q, k = x_rm.new_zeros(1, 1, r, 1), x_rm.new_zeros(1, 1, m, 1)
    one_hot = torch.eye(m, dtype=x_rm.dtype)[None, None]
    return attend(q, k, one_hot, spec, bias=DenseBias(x_rm[None, None])).out[0, 0]


def jacobians(x_rm: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    """(weights [r, m], J [r, i, k]) by automatic differentiation; rows do not see each other."""
    x = x_rm.detach().requires_grad_()
    w = weights(x, spec)
    columns = [torch.autograd.grad(w[:, i].sum(), x, retain_graph=True)[0] for i in range(x.shape[1])]
    return w.detach(), torch.stack(columns, dim=1)


def formula(x_rm: Tensor, spec: str) -> Tensor:
    """J on paper. With r = (x - low) / D, D = high - low + eps (1 where there is none) and s the softmax:

    dw_i/dx_k = r_i s_i ([i=k] - s_k) + [i=k] s_i / D
                - [k = argmin] s_i (1 - r_i) / D - [k = argmax] s_i r_i / D      (not detached; min_shift: r_i -> 0)
    """
    choice = AttentionSpec.parse(spec).weights
    s = x_rm.softmax(-1)
    eye = torch.eye(x_rm.shape[1], dtype=x_rm.dtype)
    of_softmax = eye - s[:, None, :]
    if not isinstance(choice, SelfAdjust):
        return s[:, :, None] * of_softmax
    low, high = x_rm.amin(-1, keepdim=True), x_rm.amax(-1, keepdim=True)
    at_low, at_high = (x_rm == low).to(x_rm), (x_rm == high).to(x_rm)
    if choice.form == "range":  # a zero is nobody's score
        at_low, at_high = at_low * (low < 0), at_high * (high > 0)
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    divided = choice.form in ("minmax", "range")
    d = high - low + EPS if divided else torch.ones_like(low)
    r = (x_rm if choice.form == "product" else x_rm - low) / d
    j = (r * s)[:, :, None] * of_softmax + eye * (s / d)[:, :, None]
    if choice.form != "product" and not choice.detach_extrema:
        j -= (s * (1 - r if divided else 1.0) / d)[:, :, None] * at_low[:, None, :]
        if divided:
            j -= (s * r / d)[:, :, None] * at_high[:, None, :]
    return j


def sizes(x_rm: Tensor, spec: str) -> dict[str, float]:
    """Medians over rows: norm of J, of the gradient of the row sum, of the Jacobian of the shares, and dw_0/dx_0."""
    w, j = jacobians(x_rm, spec)
    total = w.sum(-1)
    of_total = j.sum(dim=1)
    shares = (j - (w / total[:, None])[:, :, None] * of_total[:, None, :]) / total[:, None, None]
    parts = {
        "norm": j.flatten(1).norm(dim=1),
        "row_sum": of_total.norm(dim=1),
        "shares": shares.flatten(1).norm(dim=1),
        "top": j[:, 0, 0].abs(),
        "starved": j[:, 1:, 1:].diagonal(dim1=1, dim2=2).abs().amax(dim=1),
    }
    return {name: float(values.median()) for name, values in parts.items()}


def rows(draws: int, keys: int, seed: int = 0) -> Tensor:
    """Random scores, [draws, keys]."""
    return torch.randn(draws, keys, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def ahead(gap: float, shift: float = 0.0) -> Tensor:
    """Rows whose first score is `gap` above the next."""
    x = SPREAD * rows(DRAWS, KEYS)
    x[:, 0] = x[:, 1:].amax(dim=1) + gap
    return x + shift


def rescue(spec: str, steps: int) -> list[int | None]:
    """For each gap, steps of gradient descent until a token that starves is seen; None = not within `steps`.

    Eight free scores, one ahead of the others by the gap; the loss is (w_1 - 1/2)^2, the rate 1; w_1 >= 1/4 ends it.
    """
    choice = AttentionSpec.parse(spec).weights
    x = torch.zeros(len(RESCUE_GAPS), KEYS, dtype=torch.float64)
    x[:, 0] = torch.tensor(RESCUE_GAPS)
    x.requires_grad_()
    seen = torch.ones_like(x, dtype=torch.bool)
    found: list[int | None] = [None] * len(RESCUE_GAPS)
    for step in range(steps):
        w = DENSE_WEIGHTS[type(choice)](choice, x, seen)[:, 1]
        for index in range(len(found)):
            if found[index] is None and float(w[index].detach()) >= RESCUED:
                found[index] = step
        if None not in found:
            break
        (gradient,) = torch.autograd.grad((w - 0.5).square().sum(), x)
        with torch.no_grad():
            x -= gradient
    return found


def run(*, quick: bool = False) -> dict[str, Any]:
    """Every sweep for softmax and every form, detached or not."""
    steps, gaps = (20, QUICK_GAPS) if quick else (RESCUE_STEPS, GAPS)
    found: dict[str, Any] = {"gaps": list(gaps), "scales": list(SCALES), "rescue_steps": steps, "arms": {}}
    for name, spec in SPECS.items():
        x = ahead(4.0)
        found["arms"][name] = {
            "spec": spec,
            "positive": [sizes(ahead(gap), spec) for gap in gaps],
            "negative": [sizes(ahead(gap, SHIFT), spec) for gap in gaps],
            "small": [sizes(scale * rows(DRAWS, SMALL_KEYS), spec)["norm"] for scale in SCALES],
            "one_key": [_one_key(score, spec) for score in ONE_KEY],
            "rescue": rescue(spec, steps),
            "formula_off_by": float((jacobians(x, spec)[1] - formula(x, spec)).abs().max()),
        }
    return found


def _one_key(score: float, spec: str) -> tuple[float, float]:
    """(weight, its derivative) of a row that sees a single key."""
    w, j = jacobians(torch.tensor([[score]], dtype=torch.float64), spec)
    return float(w), float(j)


def at(found: Mapping[str, Any], name: str, sign: str, gap: int, part: str = "norm") -> float:
    """One value of a sweep."""
    value: float = found["arms"][name][sign][found["gaps"].index(gap)][part]
    return value


def verdict(found: Mapping[str, Any], name: str) -> str:
    """Whether a form is alive where softmax is dead, in words."""
    if name == BASELINE:
        return "dies"
    alive = {sign: at(found, name, sign, 16) > ALIVE for sign in ("positive", "negative")}
    shares = at(found, name, "positive", 16, "shares") > ALIVE
    if not any(alive.values()):
        return "dies as softmax does"
    where = (
        "alive"
        if all(alive.values())
        else f"alive only where every score is {'above' if alive['positive'] else 'below'} 0"
    )
    return f"{where}{'' if shares else ', in the row sum alone'}"
