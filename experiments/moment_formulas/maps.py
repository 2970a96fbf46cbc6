"""The cases with weights: embedding, linear map, residual sum.

Where the authors' grid has 100 or 1000 tokens, ours has few tokens and more draws: no formula here knows the number of
tokens, and what all tokens share needs draws.

Shapes: b sequences with a draw of weights each, t tokens, i/o features in and out, w features.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from clearhead.signal.moments.embedding import embedding, segment_repetition, zipf_repetition
from clearhead.signal.moments.linear import linear, linear_backward, weight_gradient
from clearhead.signal.moments.residual import residual, residual_backward
from clearhead.signal.skeleton import Matrix
from experiments.moment_formulas.case import Case, Params
from experiments.moment_formulas.draw import moments_of, second_moments_of
from experiments.moment_formulas.inputs import (
    BACKWARD,
    DECADE,
    FORWARD,
    GRADIENT_GRID,
    POINTS,
    THIRDS,
    WIDTHS,
    as_quantities,
    drawn,
    given,
    measured,
)


def draws(rows: int, columns: int, samples: int = 40_000) -> int:
    """How many weight draws give `samples` independent features on both sides."""
    return math.ceil(samples / min(rows, columns))


def chunks(count: int, entries: int) -> list[int]:
    """Split `count` draws of `entries` numbers each into pieces that fit the cache of a small machine."""
    most = max(1, 4_000_000 // entries)
    return [min(most, count - start) for start in range(0, count, most)]


def average(parts: list[tuple[int, dict[str, float]]]) -> dict[str, float]:
    """Average over pieces by their number of draws. The mean is 0 or common, so moments about it average too."""
    total = sum(size for size, _ in parts)
    return {name: sum(size * values[name] for size, values in parts) / total for name in parts[0][1]}


def weights(size: int, out: int, into: int, variance: float, generator: Generator) -> Tensor:
    """One matrix [out, into] per sequence."""
    return torch.randn(size, out, into, generator=generator).mul_(math.sqrt(variance)).requires_grad_()


def matrix_of(params: Params) -> Matrix:
    """The map of the linear case; `gain` is fan_in times the variance of a weight."""
    fan_in = int(params["fan_in"])
    return Matrix(fan_in, int(params["fan_out"]), params["gain"] / fan_in, params["sigma_b"] ** 2)


def predict_linear(params: Params) -> dict[str, float]:
    """A map with a bias."""
    x, g = given(params)
    matrix = matrix_of(params)
    found = as_quantities(linear(x, matrix), linear_backward(g, matrix))
    return {**found, "weight_gradient": weight_gradient(g, x, matrix, POINTS)}


def simulate_linear(params: Params, generator: Generator) -> dict[str, float]:
    """A fresh weight and bias for every sequence."""
    matrix = matrix_of(params)
    parts = []
    for size in chunks(draws(matrix.fan_in, matrix.fan_out), matrix.fan_in * matrix.fan_out):
        x_bti, g_bto = drawn(params, (size, POINTS, matrix.fan_in), matrix.fan_out, generator)
        w_boi = weights(size, matrix.fan_out, matrix.fan_in, matrix.variance, generator)
        bias_b1o = torch.randn(size, 1, matrix.fan_out, generator=generator) * math.sqrt(matrix.bias_variance)
        y_bto = x_bti @ w_boi.mT + bias_b1o
        by_x, by_w = torch.autograd.grad((y_bto * g_bto).sum(), (x_bti, w_boi))
        found = {**moments_of(y_bto.detach()), **second_moments_of(by_x, "gradient_")}
        parts.append((size, {**found, "weight_gradient": float(by_w.square().sum()) / size}))
    return average(parts)


def predict_residual(params: Params) -> dict[str, float]:
    """stream_scale x + branch_scale W x, W fresh."""
    x, g = given(params)
    width = int(params["width"])
    branch = Matrix(width, width, params["gain"] / width)
    below, by_branch = residual_backward(g, params["stream_scale"], params["branch_scale"])
    y = residual(x, linear(x, branch), params["stream_scale"], params["branch_scale"])
    return as_quantities(y, below + linear_backward(by_branch, branch))


def simulate_residual(params: Params, generator: Generator) -> dict[str, float]:
    """The same, with one W per sequence."""
    width = int(params["width"])
    parts = []
    for size in chunks(draws(width, width), width * width):
        x_bti, g_bti = drawn(params, (size, POINTS, width), None, generator)
        w_boi = weights(size, width, width, params["gain"] / width, generator)
        y_bti = params["stream_scale"] * x_bti + params["branch_scale"] * (x_bti @ w_boi.mT)
        parts.append((size, measured(x_bti, y_bti, g_bti)))
    return average(parts)


def tables_of(params: Params) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Variances and repetitions of token, position and segment table."""
    variances = (params["token_variance"], params["position_variance"], params["segment_variance"])
    return variances, (zipf_repetition(int(params["vocab"])), 0.0, segment_repetition())


def predict_embedding(params: Params) -> dict[str, float]:
    """Forward only: nothing lies below an embedding."""
    y = embedding(*tables_of(params))
    return {"mean": y.mean, "variance": y.variance, "covariance": y.covariance}


def simulate_embedding(params: Params, generator: Generator) -> dict[str, float]:
    """Zipf tokens, two segments with a uniform cut, fresh tables per draw (only the rows that are read are made)."""
    vocab, tokens, rows, width = int(params["vocab"]), int(params["tokens"]), 8, 64
    zipf = 1.0 / torch.arange(1, vocab + 1, dtype=torch.float64)
    place_bt = torch.arange(tokens).expand(rows, tokens)
    parts = []
    for _ in range(300):
        token_bt = torch.multinomial(zipf, rows * tokens, replacement=True, generator=generator).view(rows, tokens)
        segment_bt = (place_bt >= torch.randint(0, tokens + 1, (rows, 1), generator=generator)).long()
        y_btw = torch.zeros(rows, tokens, width)
        for ids_bt, variance in zip((token_bt, place_bt, segment_bt), tables_of(params)[0]):
            read, row_bt = ids_bt.unique(return_inverse=True)
            table = torch.randn(len(read), width, generator=generator) * math.sqrt(variance)
            y_btw += table[row_bt]
        parts.append((1, {"mean": float(y_btw.mean()), **second_moments_of(y_btw)}))
    return average(parts)


CASES = (
    Case(
        name="embedding",
        grid={
            "vocab": (100, 1000, 10_000, 30_522),
            "tokens": (16, 64, 256),
            "token_variance": (0.1, 0.3, 1.0),
            "position_variance": (0.0, 0.3, 1.0),
            "segment_variance": (0.0, 0.3, 1.0),
        },
        predict=predict_embedding,
        simulate=simulate_embedding,
        quantities=FORWARD,
        note="Zipf tokens, positions, two segments with a uniform cut; fresh tables for every 8 sequences.",
    ),
    Case(
        name="linear",
        grid={
            "mu": (0.1, 1.0, 10.0),
            "sigma": DECADE,
            "r": THIRDS,
            "fan_in": WIDTHS,
            "fan_out": WIDTHS,
            "gain": DECADE,
            "sigma_b": (0.0, 1.0),
            **GRADIENT_GRID,
        },
        predict=predict_linear,
        simulate=simulate_linear,
        quantities=(*FORWARD, *BACKWARD, "weight_gradient"),
        note=f"{POINTS} tokens where the authors have 100 or 1000, a fresh weight for every sequence. The bias and the "
        "gradient of the weight are ours.",
        published={
            "mean": (0.0, 0.4, 1.3),
            "variance": (0.4, 1.4, 2.8),
            "covariance": (0.4, 1.4, 2.8),
            "gradient_variance": (0.2, 1.0, 2.2),
            "gradient_covariance": (0.2, 1.0, 2.2),
        },
    ),
    Case(
        name="residual",
        grid={
            "mu": (0.0, 1.0),
            "sigma": DECADE,
            "r": THIRDS,
            "width": (100, 316),
            "gain": (0.316, 1.0, 3.16),
            "stream_scale": (0.5, 0.995, 1.0),
            "branch_scale": (0.07, 0.5, 1.0),
            **GRADIENT_GRID,
        },
        predict=predict_residual,
        simulate=simulate_residual,
        quantities=FORWARD + BACKWARD,
        note="The branch is a fresh matrix on the stream itself, so that the simulation may contradict the assumption "
        "that the two are uncorrelated. Ours.",
    ),
)
