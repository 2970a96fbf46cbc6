"""Moments of attention, right also where softmax saturates. Imports no torch.

With x = common + own per token (raw covariance C, and o = variance - covariance), weights a whose rows sum to 1, and a
fresh W_v, the mix m_i = sum_j a_ij W_v x_j has

    variance   = d var_v { C (1 + P p/(1-p)) + o [P/(1-p) + (pull - P)/d] }
    covariance = d var_v { C + o [overlap + coherent/d] }

P = E sum a^2 of a row; p dropout on the weights; overlap = E sum_j a_ij a_i'j of two rows; pull = E (sum_j a_ij
u_ij)^2 with u the scores in units of their deviation: attention moves the mix along the direction of the query, which
is one direction of d, but by up to s. All of them are integrals over the scores (`laplace.py`, `rows.py`), not
expansions in them; the published form (`published_attention.py`) is their limit for weak scores. The formulas above
stand in `mean_read.py`, LASER's in `laser_read.py`, Self-Adjust's in `self_adjust_read.py`. Derivation and accuracy:
docs/attention-moments.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from clearhead.attention.spec import AttentionSpec, Full, Laser, Pattern, SelfAdjust, Softmax, Window
from clearhead.errors import UserError
from clearhead.signal.moments.flow import Flow, Setting
from clearhead.signal.moments.laser_read import laser_read
from clearhead.signal.moments.mean_read import mean_read
from clearhead.signal.moments.rows import row_table
from clearhead.signal.moments.scores import NEUTRAL, TemperatureMoments, scores
from clearhead.signal.moments.self_adjust_read import self_adjust_read
from clearhead.signal.moments.types import Moments
from clearhead.signal.skeleton import AttentionShape, Matrix
from clearhead.signal.trace import AttentionStats


@dataclass(frozen=True, eq=False)
class AttentionMoments:
    """What attention makes of its input, and what the backward pass needs of it."""

    output: Moments
    """After the output matrix, before residual dropout."""
    mix: Moments
    """Before the output matrix: all heads' weighted values."""
    stats: AttentionStats
    notes: tuple[str, ...]
    """What is approximated for this shape."""
    setting: Setting
    flow: Flow


def attention(
    x: Moments,
    shape: AttentionShape,
    *,
    width: int,
    tokens: int,
    training: bool = True,
    context: Moments | None = None,
    context_tokens: int | None = None,
    temperature: TemperatureMoments = NEUTRAL,
) -> AttentionMoments:
    """Moments of an attention over `tokens` tokens of moments `x` (what its norm hands over).

    `width` is the width of x. With `shape.cross`, keys and values come from `context` of `context_tokens` tokens.
    `training` says whether dropout acts on the weights. `temperature` gives mean and variance of the inverse
    temperatures of a selective or learned spec.

    Raises `ValueError` for a shape that does not fit `width`, or a cross attention without context; `UserError` for
    weights without a theory.
    """
    _check(shape, width, tokens, context, context_tokens)
    y = context if shape.cross and context is not None else x
    keys = context_tokens if shape.cross and context_tokens is not None else tokens
    spec = AttentionSpec.parse(shape.spec)
    window = _window(spec.pattern, keys, shape.causal and not shape.cross)
    setting = Setting(
        x=x,
        y=y,
        shape=shape,
        queries=tokens,
        keys=keys,
        dropout=shape.dropout if training else 0.0,
        temperature=temperature,
        scores=scores(x, y, shape, keys, tokens, temperature),
        table=row_table(keys, shape.causal and not shape.cross, window),
    )
    flow = _flow(spec, setting)
    return AttentionMoments(
        mapped(flow.mix, shape.output), flow.mix, flow.stats, _notes(shape, spec, setting) + flow.notes, setting, flow
    )


def _window(pattern: Pattern, keys: int, causal: bool) -> int | None:
    """The window that stands for a pattern: its own, or one of as many keys as a query sees on average."""
    if isinstance(pattern, Full):
        return None
    if isinstance(pattern, Window):
        return min(pattern.size, keys)
    return min(round(pattern.mean_keys(keys, causal=causal)), keys)


def mapped(x: Moments, matrix: Matrix) -> Moments:
    """Moments after a linear map with fresh weights; its bias is the same for all tokens."""
    gain = matrix.fan_in * matrix.variance
    bias = matrix.bias_variance
    return Moments(0.0, gain * x.second_moment + bias, gain * x.raw_covariance + bias)


def _flow(spec: AttentionSpec, setting: Setting) -> Flow:
    if isinstance(spec.weights, SelfAdjust):
        return self_adjust_read(setting, spec.weights)
    if not isinstance(spec.weights, Softmax):
        raise UserError(f"signal: no theory for the weights {spec.weights.name!r}; measure the model instead")
    return laser_read(setting) if isinstance(spec.read, Laser) else mean_read(setting)


def _notes(shape: AttentionShape, spec: AttentionSpec, setting: Setting) -> tuple[str, ...]:
    notes = []
    if setting.table.window is not None:
        notes.append("window: two rows share the average number of keys")
    if not isinstance(spec.pattern, Full | Window):
        notes.append(f"{spec.pattern.name}: taken as a window of as many keys as a query sees on average")
    if shape.rope_base is not None:
        notes.append("rotary positions: scores are taken as independent over keys, what keys share by its mean")
    if spec.temperature is not None:
        notes.append("temperature: the gradient through the temperature itself is left out")
    return tuple(notes)


def _check(shape: AttentionShape, width: int, tokens: int, context: Moments | None, context_tokens: int | None) -> None:
    if shape.query.fan_in != width or shape.output.fan_out != width:
        raise ValueError(
            f"attention: expected query.fan_in and output.fan_out to be the width {width}, got "
            f"{shape.query.fan_in} and {shape.output.fan_out}"
        )
    if shape.kv_heads < 1 or shape.heads % shape.kv_heads:
        raise ValueError(f"attention: {shape.heads} heads cannot share {shape.kv_heads} key/value heads evenly")
    if tokens < 1:
        raise ValueError(f"attention: expected at least 1 token, got {tokens}")
    if shape.cross and (context is None or context_tokens is None):
        raise ValueError("attention: cross attention needs context and context_tokens")
    if not 0.0 <= shape.dropout < 1.0:
        raise ValueError(f"attention: expected a dropout in [0, 1), got {shape.dropout}")
