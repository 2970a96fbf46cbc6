"""How far random features are from attention: by their number, their law, and the size of queries and keys.

    outputs    root mean square of (output - exact output), 512 tokens of 16 dimensions, over draws of the rows
    kernel     mean squared error of single entries exp(x.y), m = d = 16: orthogonal rows against independent ones
    signs      rows of attention whose denominator is not above 0

Queries, keys and values have independent normal entries; `std` is that of queries and keys.
"""

from __future__ import annotations

import math
import time
from typing import Any

import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.attention.projection import draw_projection
from clearhead.kernels.features import make_map

TOKENS, DIM = 512, 16
FEATURES = (16, 32, 64, 128, 256, 512)
STDS = (0.25, 0.5, 1.0)
KERNEL_STDS = (0.25, 0.5, 0.75)
LAWS = {
    "positive, orthogonal": ("softmax", True),
    "positive, independent": ("softmax", False),
    "hyperbolic, orthogonal": ("hyperbolic", True),
    "trigonometric, orthogonal": ("trigonometric", True),
    "trigonometric, independent": ("trigonometric", False),
}


def inputs(std: float) -> list[Tensor]:
    """Query, key and value, [1, 1, tokens, dim]."""
    generator = torch.Generator().manual_seed(round(1000 * std))
    q, k, v = (torch.randn(1, 1, TOKENS, DIM, generator=generator, dtype=torch.float64) for _ in range(3))
    return [q * std, k * std, v]


def rows(law: str, features: int, draw: int) -> Tensor:
    """The projection of a draw, [m, d]."""
    seed = 10_000 * features + draw
    return draw_projection(features, DIM, seed=seed, orthogonal=LAWS[law][1], dtype=torch.float64)


def outputs(draws: int) -> list[dict[str, Any]]:
    """By std, law and number of features: root of the mean squared error over draws, and the median over draws."""
    answer = []
    for std in STDS:
        q, k, v = inputs(std)
        exact = attend(q, k, v, "softmax").out
        for law, (kernel, _) in LAWS.items():
            for features in FEATURES:
                spec = f"performer:kernel={kernel},features={features}"
                w = torch.stack([rows(law, features, draw) for draw in range(draws)])  # a head for each draw
                a, b, c = (t.expand(1, draws, TOKENS, DIM) for t in (q, k, v))
                out = attend(a, b, c, spec, mask=Mask(), projection=w).out
                found = (out - exact).square().mean(dim=(0, 2, 3))
                answer.append(
                    {
                        "std": std,
                        "law": law,
                        "features": features,
                        "rmse": math.sqrt(float(found.mean())),
                        "median_mse": float(found.median()),
                        "output_rms": math.sqrt(float(exact.square().mean())),
                    }
                )
    return answer


def slope(points: list[dict[str, Any]]) -> float:
    """Of log error over log features, by least squares."""
    x = torch.tensor([math.log(p["features"]) for p in points], dtype=torch.float64)
    y = torch.tensor([math.log(p["rmse"]) for p in points], dtype=torch.float64)
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / x.square().sum())


def entries(draws: int) -> list[dict[str, Any]]:
    """By std and kernel: error of an entry with orthogonal rows over that with independent ones, m = d."""
    answer = []
    for std in KERNEL_STDS:
        q, k, _ = inputs(std)
        x, y = (t[0, 0, :64] * DIM**-0.25 for t in (q, k))
        exact = (x @ y.mT).exp()
        for name in ("positive", "trigonometric"):
            mean = {}
            for law in ("orthogonal", "independent"):
                w = torch.stack([rows(f"{name}, {law}", DIM, draw) for draw in range(draws)])
                mean[law] = float((_kernel(LAWS[f"{name}, {law}"][0], w, x, y) - exact).square().mean())
            mean["lemma"] = float(_expected(name, x, y).mean())
            answer.append({"std": std, "kernel": name, **mean, "ratio": mean["orthogonal"] / mean["independent"]})
    return answer


def _expected(name: str, x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error of each entry with independent rows, m = d (Lemma 2 of the paper)."""
    exact = (x @ y.mT).exp()
    away, between = ((x[:, None] + sign * y[None]).square().sum(-1) for sign in (1.0, -1.0))
    if name == "positive":
        return away.exp() * exact.square() * (1.0 - (-away).exp()) / DIM
    return away.exp() / exact.square() * (1.0 - (-between).exp()).square() / (2 * DIM)


def _kernel(kernel: str, w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    features = make_map(kernel, w, torch.float64)
    (a, c), (b, e) = features(x), features(y)
    return (a @ b.mT) * (c.unsqueeze(-1) + e.unsqueeze(-2)).exp()


def signs(draws: int) -> list[dict[str, Any]]:
    """At std 1: how many rows have a denominator that is not above 0."""
    q, k, _ = inputs(1.0)
    x, y = (t[0, 0] * DIM**-0.25 for t in (q, k))
    answer = []
    for law in ("trigonometric, orthogonal", "positive, orthogonal"):
        kernel = LAWS[law][0]
        for features in (16, 1024):
            bad = 0
            for draw in range(draws):
                features_of = make_map(kernel, rows(law, features, draw), torch.float64)
                (a, _), (b, level) = features_of(x), features_of(y)  # the query's own factor is above 0
                sums = a @ (b * (level - level.max()).exp().unsqueeze(-1)).sum(0)
                bad += int((sums <= 0).sum())
            answer.append({"law": law, "features": features, "bad": bad, "rows": draws * TOKENS})
    return answer


def measure(*, quick: bool) -> dict[str, Any]:
    """Everything."""
    torch.set_num_threads(1)
    began = time.process_time()
    found = outputs(2 if quick else 60)
    slopes = [
        {"std": std, "law": law, "slope": slope([p for p in found if p["std"] == std and p["law"] == law])}
        for std in STDS
        for law in LAWS
    ]
    return {
        "outputs": found,
        "slopes": slopes,
        "entries": entries(30 if quick else 1500),
        "signs": signs(2 if quick else 10),
        "cpu_seconds": round(time.process_time() - began, 1),
    }
