"""The feed-forward, plain and gated, as a whole: up, activation, dropout, down, and the gradients of its matrices.

Shapes: b sequences with a draw of weights each, t tokens, w width, h hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from clearhead.signal.moments.feed_forward import feed_forward, feed_forward_backward, feed_forward_gradients
from clearhead.signal.skeleton import FeedForwardShape, Matrix
from experiments.moment_formulas.case import Case, Params
from experiments.moment_formulas.draw import moments_of, second_moments_of
from experiments.moment_formulas.inputs import BACKWARD, CORRELATIONS, FORWARD, POINTS, as_quantities, drawn, given
from experiments.moment_formulas.maps import average, chunks, draws, weights

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}
SAMPLES = 60_000
"""Products of Gaussians have heavy tails; this many draws hold the noise near 1 %."""
KINDS = ("relu", "gelu", "gelu_tanh", "silu")


def shape_of(params: Params, gated: bool) -> FeedForwardShape:
    """The branch; `gain` is the fan-in times the variance of a weight, in every matrix."""
    width = int(params["width"])
    hidden = int(params["ratio"] * width)
    inward = Matrix(width, hidden, params["gain"] / width)
    return FeedForwardShape(
        activation=KINDS[int(params["activation"])],
        up=inward,
        down=Matrix(hidden, width, params["gain"] / hidden),
        gate=inward if gated else None,
        dropout=params["p"],
    )


def predict(params: Params, gated: bool) -> dict[str, float]:
    """The theory of the whole branch."""
    x, g = given(params)
    shape = shape_of(params, gated)
    gradients = feed_forward_gradients(g, x, shape, POINTS)
    found = as_quantities(feed_forward(x, shape), feed_forward_backward(g, x, shape))
    return {**found, **{f"{name}_weight_gradient": value for name, value in gradients.items()}}


def simulate(params: Params, gated: bool, generator: Generator) -> dict[str, float]:
    """The branch with fresh matrices for every sequence."""
    shape = shape_of(params, gated)
    width, hidden = shape.up.fan_in, shape.up.fan_out
    act = ACTIVATIONS[shape.activation]
    parts = []
    for size in chunks(draws(width, hidden, SAMPLES), width * hidden):
        x_btw, g_btw = drawn(params, (size, POINTS, width), None, generator)
        matrices = {"up": weights(size, hidden, width, shape.up.variance, generator)}
        matrices["down"] = weights(size, width, hidden, shape.down.variance, generator)
        up_bth = x_btw @ matrices["up"].mT
        if gated:
            matrices["gate"] = weights(size, hidden, width, shape.up.variance, generator)
            hidden_bth = act(x_btw @ matrices["gate"].mT) * up_bth
        else:
            hidden_bth = act(up_bth)
        y_btw = _dropped(hidden_bth, shape.dropout, generator) @ matrices["down"].mT
        by_x, *by_w = torch.autograd.grad((y_btw * g_btw).sum(), (x_btw, *matrices.values()))
        found = {**moments_of(y_btw.detach()), **second_moments_of(by_x, "gradient_")}
        norms = {f"{name}_weight_gradient": float(w.square().sum()) / size for name, w in zip(matrices, by_w)}
        parts.append((size, {**found, **norms}))
    return average(parts)


def _dropped(x: Tensor, p: float, generator: Generator) -> Tensor:
    return x * (torch.rand(x.shape, generator=generator) >= p) / (1.0 - p)


def _case(name: str, gated: bool, note: str) -> Case:
    return Case(
        name=name,
        grid={
            "activation": tuple(range(len(KINDS))),
            "mu": (0.0, 0.5),
            "sigma": (0.316, 1.0, 3.16),
            "r": CORRELATIONS,
            "width": (100, 316),
            "ratio": (1, 2, 4),
            "gain": (0.5, 1.0, 2.0),
            "p": (0.0, 0.1, 0.3),
            "sigma_g": (0.1, 1.0),
            "r_g": CORRELATIONS,
        },
        predict=lambda params: predict(params, gated),
        simulate=lambda params, generator: simulate(params, gated, generator),
        quantities=(
            *FORWARD,
            *BACKWARD,
            "up_weight_gradient",
            "down_weight_gradient",
            *(("gate_weight_gradient",) if gated else ()),
        ),
        note=note,
    )


NOTE = f"activation: {', '.join(f'{i} {kind}' for i, kind in enumerate(KINDS))}; p is dropout on the hidden activation."

CASES = (
    _case("feed_forward", False, NOTE + " Its error holds the finite width: the length of x is not quite constant."),
    _case(
        "gated_feed_forward",
        True,
        NOTE + " act(gate x) * up x. Ours. Gate and up share the length of x, so that without a norm "
        "before it the variance is up to 1 + 2/width higher than predicted; simulated here without a norm.",
    ),
)
