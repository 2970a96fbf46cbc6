"""The feed-forward: down(act(up x)), or down(act(gate x) * up x), with dropout on the hidden activation."""

from __future__ import annotations

from dataclasses import dataclass

from clearhead.signal.moments.activation import activation, activation_backward
from clearhead.signal.moments.dropout import dropout, dropout_backward
from clearhead.signal.moments.gated import gated, gated_backward
from clearhead.signal.moments.linear import linear, linear_backward, weight_gradient
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import FeedForwardShape


def feed_forward(x: Moments, shape: FeedForwardShape, training: bool = True) -> Moments:
    """Return the moments of the branch, after `down` and before the residual's dropout.

    For ReLU, mean 0, no gate, no dropout this is DeepScaleLM's block: variance
    d d_ff v_up v_down s^2 / 2 and token correlation K(r), the raw one. Dropout on the hidden activation (`training`)
    multiplies the variance by 1 / (1 - p) and leaves the covariance.
    """
    return linear(_hidden(x, shape, training), shape.down)


def feed_forward_backward(
    g: GradientMoments, x: Moments, shape: FeedForwardShape, training: bool = True
) -> GradientMoments:
    """Return the gradient by x, from `g` at the output of `down`, which does not depend on the forward values.

    Approximate by one more thing of order 1/width: `up` makes the signs that its own transpose meets on the way back.
    """
    inner = _gradients(g, x, shape, training)
    below = linear_backward(inner.up, shape.up)
    if shape.gate is None or inner.gate is None:
        return below
    return below + linear_backward(inner.gate, shape.gate)


def feed_forward_gradients(
    g: GradientMoments, x: Moments, shape: FeedForwardShape, tokens: int, training: bool = True
) -> dict[str, float]:
    """Return E ||dL/dW||_F^2 of one sequence for `up`, `down` and, when there is one, `gate`; see `weight_gradient`."""
    inner = _gradients(g, x, shape, training)
    found = {
        "up": weight_gradient(inner.up, x, shape.up, tokens),
        "down": weight_gradient(g, _hidden(x, shape, training), shape.down, tokens),
    }
    if shape.gate is not None and inner.gate is not None:
        found["gate"] = weight_gradient(inner.gate, x, shape.gate, tokens)
    return found


@dataclass(frozen=True)
class _Inner:
    up: GradientMoments
    """By the output of `up`."""
    gate: GradientMoments | None
    """By the output of `gate`."""


def _hidden(x: Moments, shape: FeedForwardShape, training: bool) -> Moments:
    up = linear(x, shape.up)
    if shape.gate is None:
        hidden = activation(shape.activation, up)
    else:
        hidden = gated(shape.activation, linear(x, shape.gate), up)
    return dropout(hidden, shape.dropout if training else 0.0)


def _gradients(g: GradientMoments, x: Moments, shape: FeedForwardShape, training: bool) -> _Inner:
    at_hidden = dropout_backward(linear_backward(g, shape.down), shape.dropout if training else 0.0)
    up = linear(x, shape.up)
    if shape.gate is None:
        return _Inner(activation_backward(shape.activation, at_hidden, up), None)
    by_gate, by_up = gated_backward(shape.activation, at_hidden, linear(x, shape.gate), up)
    return _Inner(by_up, by_gate)
