"""Feed-forward branches and whole sub-layers, composed of the parts, against autograd.

Shapes: b sequences with fresh weights each, t tokens, w width, h hidden.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from clearhead.signal.moments.arc_cosine import relu_raw_correlation
from clearhead.signal.moments.dropout import dropout, dropout_backward
from clearhead.signal.moments.feed_forward import feed_forward, feed_forward_backward, feed_forward_gradients
from clearhead.signal.moments.norm import normalise, normalise_backward
from clearhead.signal.moments.residual import residual, residual_backward
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import FeedForwardShape, Matrix, Norm

WIDTH, HIDDEN, TOKENS, DRAWS = 64, 128, 3, 1500
KEEP, ADD, P = 0.9, 0.6, 0.2
NORM = Norm("layer")


def shape(activation: str, gated: bool = False, p: float = 0.0) -> FeedForwardShape:
    # Gate and up differ, so that they cannot be mistaken for each other.
    up, gate = Matrix(WIDTH, HIDDEN, 1.5 / WIDTH), Matrix(WIDTH, HIDDEN, 0.6 / WIDTH)
    return FeedForwardShape(activation, up, Matrix(HIDDEN, WIDTH, 1.2 / HIDDEN), gate if gated else None, p)


def shared(variance: float, r: float) -> torch.Tensor:
    common, own = torch.randn(DRAWS, 1, WIDTH), torch.randn(DRAWS, TOKENS, WIDTH)
    return math.sqrt(variance) * (math.sqrt(r) * common + math.sqrt(1 - r) * own)


def dropped(x: torch.Tensor, p: float) -> torch.Tensor:
    return F.dropout(x, p)


def branch(x_btw: torch.Tensor, form: FeedForwardShape, w: dict[str, torch.Tensor]) -> torch.Tensor:
    act = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}[form.activation]
    up_bth = x_btw @ w["up"].mT
    hidden_bth = act(up_bth) if form.gate is None else act(x_btw @ w["gate"].mT) * up_bth
    return dropped(hidden_bth, form.dropout) @ w["down"].mT


def fresh(form: FeedForwardShape) -> dict[str, torch.Tensor]:
    matrices = {"up": form.up, "down": form.down, **({"gate": form.gate} if form.gate else {})}
    return {
        name: (torch.randn(DRAWS, m.fan_out, m.fan_in) * math.sqrt(m.variance)).requires_grad_()
        for name, m in matrices.items()
    }


def second_moments(x_btw: torch.Tensor) -> tuple[float, float]:
    square = float(x_btw.square().sum(1).mean())
    return square / TOKENS, (float(x_btw.sum(1).square().mean()) - square) / (TOKENS * (TOKENS - 1))


def assert_close(predicted: Moments | GradientMoments, found: tuple[float, float]) -> None:
    # The noise of a covariance goes with the variance. Order 1/width, 1.6 % here, is inside.
    assert predicted.variance == pytest.approx(found[0], rel=0.04)
    assert predicted.covariance == pytest.approx(found[1], abs=0.02 * found[0])


def test_a_relu_block() -> None:
    # Variance d d_ff v1 v2 / 2, correlation K(r); the backward gain is the same number.
    form = shape("relu")
    out = feed_forward(Moments.of(1.0, 0.3), form)
    product = WIDTH * HIDDEN * form.up.variance * form.down.variance / 2
    assert out.variance == pytest.approx(product)
    assert out.correlation == pytest.approx(relu_raw_correlation(0.3))
    back = feed_forward_backward(GradientMoments.of(1.0, 0.5), Moments.of(1.0, 0.3), form)
    assert back.variance == pytest.approx(product)
    assert back.correlation == pytest.approx(0.5 * (0.5 + math.asin(0.3) / math.pi))


def test_admins_profile_in_closed_form() -> None:
    # Xavier, dropout 0.1 on the hidden activation and behind the branch; the mean of the shipped profile is 0.39516.
    xavier = 2 / (512 + 2048)
    form = FeedForwardShape("relu", Matrix(512, 2048, xavier), Matrix(2048, 512, xavier), dropout=0.1)
    assert dropout(feed_forward(Moments.of(1.0, 0.2), form), 0.1).variance == pytest.approx(0.39506, abs=1e-5)


@pytest.mark.parametrize(("width", "p", "want"), [(512, 0.0, 0.806), (512, 0.1, 0.799)])
def test_gelu_with_the_constants_of_relu(width: int, p: float, want: float) -> None:
    # Forward gain 0.806 / 0.799 and backward gain 0.866 / 0.858 in place of 1.
    variance = math.sqrt((1 - p) / 2) / width
    form = FeedForwardShape("gelu", Matrix(width, 4 * width, variance), Matrix(4 * width, width, variance))
    out = dropout(feed_forward(Moments.of(1.0, 0.5), form), p)
    assert out.variance == pytest.approx(want, abs=6e-4)
    back = feed_forward_backward(dropout_backward(GradientMoments.of(1.0, 0.0), p), Moments.of(1.0, 0.5), form)
    assert back.variance == pytest.approx({0.0: 0.866, 0.1: 0.858}[p], abs=6e-4)


def test_training_is_what_switches_dropout() -> None:
    x, g = Moments.of(1.0, 0.3), GradientMoments.of(1.0, 0.3)
    form = shape("gelu", p=0.25)
    on, off = feed_forward(x, form, training=True), feed_forward(x, form, training=False)
    assert on.variance == pytest.approx(off.variance / 0.75)
    assert on.covariance == pytest.approx(off.covariance)
    back_on, back_off = (feed_forward_backward(g, x, form, training) for training in (True, False))
    assert back_on.variance == pytest.approx(back_off.variance / 0.75)
    weights_on, weights_off = (feed_forward_gradients(g, x, form, 1, training) for training in (True, False))
    assert weights_on["down"] == pytest.approx(weights_off["down"] / 0.75)
    assert weights_on["up"] == pytest.approx(weights_off["up"] / 0.75)


@pytest.mark.parametrize(
    ("activation", "gated", "p"), [("relu", False, 0.2), ("gelu", False, 0.0), ("silu", True, 0.3)]
)
def test_branch_agrees_with_autograd(activation: str, gated: bool, p: float) -> None:
    g, form = GradientMoments.of(0.7, 0.8), shape(activation, gated, p)
    # Normalised inputs: a branch reads a norm, and so no length of x is shared by gate and up.
    x_btw = F.layer_norm(shared(1.0, 0.7), (WIDTH,)).requires_grad_()
    x = Moments(0.0, *second_moments(x_btw.detach()))
    w = fresh(form)
    y_btw = branch(x_btw, form, w)
    by_x, *by_w = torch.autograd.grad((y_btw * shared(0.7, 0.8)).sum(), (x_btw, *w.values()))
    out, back = feed_forward(x, form), feed_forward_backward(g, x, form)
    assert_close(out, second_moments(y_btw.detach()))
    assert_close(back, second_moments(by_x))
    predicted = feed_forward_gradients(g, x, form, TOKENS)
    assert sorted(predicted) == sorted(w)
    for name, found in zip(w, by_w):
        assert predicted[name] == pytest.approx(float(found.square().sum()) / DRAWS, rel=0.05), name


@pytest.mark.parametrize("placement", ["pre", "post"])
def test_sub_layer_agrees_with_autograd(placement: str) -> None:
    x, g, form = Moments.of(2.0, 0.4), GradientMoments.of(0.7, 0.5), shape("relu", p=0.1)
    w, x_btw = fresh(form), shared(2.0, 0.4).requires_grad_()
    if placement == "pre":
        normed_btw = F.layer_norm(x_btw, (WIDTH,))
        y_btw = KEEP * x_btw + ADD * dropped(branch(normed_btw, form, w), P)
        normed = normalise(x, WIDTH, NORM)
        out = residual(x, dropout(feed_forward(normed, form), P), KEEP, ADD)
        below, by_branch = residual_backward(g, KEEP, ADD)
        at_normed = feed_forward_backward(dropout_backward(by_branch, P), normed, form)
        back = below + normalise_backward(at_normed, x, WIDTH, NORM)
    else:
        y_btw = F.layer_norm(KEEP * x_btw + ADD * dropped(branch(x_btw, form, w), P), (WIDTH,))
        summed = residual(x, dropout(feed_forward(x, form), P), KEEP, ADD)
        out = normalise(summed, WIDTH, NORM)
        below, by_branch = residual_backward(normalise_backward(g, summed, WIDTH, NORM), KEEP, ADD)
        back = below + feed_forward_backward(dropout_backward(by_branch, P), x, form)
    (by_x,) = torch.autograd.grad((y_btw * shared(0.7, 0.5)).sum(), x_btw)
    assert_close(out, second_moments(y_btw.detach()))
    assert_close(back, second_moments(by_x))
