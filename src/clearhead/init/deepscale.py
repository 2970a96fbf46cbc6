"""DeepScaleLM (arXiv 2403.09635): every constant of the scheme, as pure functions. Imports no torch.

    x <- lambda x + beta f(x)      lambda^2 + beta^2 = 1, the same two numbers in every residual sum of a stack
    beta^2 = k / N^alpha           N counts layers or residual branches: `depth_counts`

Each branch is scaled so that its variance with dropout on is 1, so the stream's variance stays 1 at any depth. What the
values of a branch weigh depends on the token correlation r of the stream (attention averages over tokens, and only what
they share survives), so the standard deviation of V and O follows a recursion over the layers.

Read in the authors' code: the recursion, the standard deviations for ReLU and d_ff = 4d, lambda^2 = 0.995 at 192
layers.
From third-party readings of the paper: k = 2, the exponent alpha, one over the number of tables, the simplified form.
Derived here: any d_ff, exact GeLU and gated constants, grouped queries, cross attention, a score scale other than
1/sqrt(head_dim), dropout inside the feed-forward. The paper's text was not at hand: whether its N counts layers or
branches is open, and none of its result tables is known here. docs/initialisation.md has the derivations.

Legend: d width, p dropout on a branch, r token correlation (centred, which is also raw: the stream has mean 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from clearhead.errors import UserError, unknown
from clearhead.signal.moments.arc_cosine import relu_raw_correlation
from clearhead.signal.moments.types import Moments

DEPTH_COUNTS = ("layers", "blocks")
CONSTANTS = ("exact", "published")
CORRELATION_FLOOR = 0.01
"""Smallest embedding correlation that is used. The variance of V and O goes with r^(-1/2) each; below 1 % what tokens
share is less than what a mean over a hundred tokens leaves of their differences, and the formula would overshoot."""


def _activated(name: str, variance: float, r: float) -> Moments:
    from clearhead.signal.moments.activation import activation  # loads scipy, which a config does not need

    return activation(name, Moments.of(variance, min(1.0, r)))


@dataclass(frozen=True)
class ResidualConstants:
    """stream_scale * stream + branch_scale * branch."""

    stream_scale: float
    branch_scale: float


def residual_constants(
    layers: int, k: float = 2.0, alpha: float = 1.0, depth_counts: str = "layers", *, branches: int = 2
) -> ResidualConstants:
    """lambda = sqrt(1 - k / N^alpha) and beta = sqrt(k / N^alpha).

    Args:
        layers: of the stack. branches: residual branches of a layer (3 with cross attention), counted by "blocks".
        k: 2 is what third-party readings recommend; the authors' own figures use 0.96 per layer at 192 layers.
        alpha: above 1 steadier and less expressive, below 1 the reverse.

    Raises `UserError` when beta^2 exceeds 1.
    """
    if depth_counts not in DEPTH_COUNTS:
        raise unknown("depth_counts", depth_counts, DEPTH_COUNTS)
    if layers < 1 or not k > 0.0:
        raise UserError(f"deepscale: expected at least one layer and k above 0, got layers={layers}, k={k:g}")
    depth = layers if depth_counts == "layers" else layers * branches
    beta2 = k / depth**alpha
    if beta2 > 1.0:
        raise UserError(
            f"deepscale: beta^2 = k / N^alpha = {k:g} / {depth}^{alpha:g} = {beta2:.4g} exceeds 1; "
            f"lower deepscale_k or use more layers"
        )
    return ResidualConstants(math.sqrt(1.0 - beta2), math.sqrt(beta2))


def embedding_std(dropout: float = 0.0, tables: int = 1) -> float:
    """sqrt((1 - p) / tables): the sum of the tables has variance 1 after dropout p (the authors' code has 3 tables)."""
    return math.sqrt((1.0 - dropout) / tables)


def logit_multiplier(width: int, embedding_variance: float) -> float:
    """1 / sqrt(d var_emb): a normed state times this has logits of variance 1 under a tied output matrix.

    The authors' code has 1 / sqrt(0.3 d), which is this for p = 0.1 and three tables.
    """
    return 1.0 / math.sqrt(width * embedding_variance)


def key_std(fan_in: int) -> float:
    """1 / sqrt(d)."""
    return fan_in**-0.5


def query_std(fan_in: int, head_dim: int, scale: float | None = None) -> float:
    """1 / sqrt(d), so that a score scaled by 1/sqrt(head_dim) has variance 1.

    With another scale s (T5: 1) the query takes the rest: 1 / (s sqrt(head_dim d)) [derived here].
    """
    s = head_dim**-0.5 if scale is None else scale
    return fan_in**-0.5 / (s * math.sqrt(head_dim))


def attention_share(
    r: float, tokens: int | None = None, *, causal: bool = False, window: int | None = None
) -> tuple[float, float]:
    """(m, c): variance and covariance of attention's averages of values with variance 1 and token correlation r.

    tokens = None is the published limit of many tokens: all averages are equal, m = c = r. With T tokens the values'
    own parts do not average out [derived here]. A query that sees n keys with scores of variance 1, of which 1 - r lies
    within its row, keeps

        m = r + (1 - r) mean_n(e^(1-r) / (e^(1-r) + n - 1))         n = T, or 1 ... T when causal, at most the window

    and two queries share what all keys of the earlier one give both: c = r + (1 - r) / T, causal r + (1 - r) mean 1/n
    over pairs; with a window c = r is taken. At r = 0.05 and 256 causal tokens m is 0.11: the limit would make the
    first attention branch of a decoder 2.3 times too large.
    """
    if tokens is None:
        return r, r
    import numpy as np  # which a config does not need

    most = tokens if window is None else min(tokens, window)
    odds = math.exp(1.0 - r)
    if causal:
        n = np.arange(1, tokens + 1, dtype=np.float64)
        own = float((odds / (odds + np.minimum(n, most) - 1.0)).mean())
        common = float(2.0 * (1.0 - 1.0 / n).sum() / (tokens * max(1, tokens - 1)))
    else:
        own, common = odds / (odds + most - 1), 1.0 / most
    if most < tokens:
        common = 0.0
    return r + (1.0 - r) * own, r + (1.0 - r) * common


def value_output_std(fan_in: int, r: float, dropout: float = 0.0) -> float:
    """sqrt(sqrt((1 - p) / r) / fan_in), for V (fan_in d) and O (fan_in heads * head_dim) alike; r is `attention_share`.

    Attention leaves of d var_v the share r, so the branch has d var_v * n_o var_o * r / (1 - p) = 1
    with n_o = fan_in of O [authors' code for n_o = d]. Grouped queries change nothing: each head still mixes a value of
    this variance, and the columns of O are independent [derived here].
    """
    return math.sqrt(math.sqrt((1.0 - dropout) / r) / fan_in)


def feed_forward_std(
    width: int,
    hidden: int,
    activation: str = "relu",
    *,
    gated: bool = False,
    dropout: float = 0.0,
    hidden_dropout: float = 0.0,
    constants: str = "exact",
) -> float:
    """One standard deviation s for every matrix of the feed-forward, so that the branch has variance 1.

        plain   hidden s^2 E[act(x)^2] = (1 - p)(1 - p_hidden)              x ~ N(0, d s^2)
        gated   hidden s^2 E[act(x)^2] d s^2 = (1 - p)(1 - p_hidden)

    For ReLU and hidden = 4d that is sqrt(sqrt((1 - p) / 2) / d), the authors' code. constants = "published" takes the
    ReLU value for whatever activation, as the authors' BERT does with GeLU (whose branch then has variance 0.80 at
    p = 0.1); a gated unit has no published value.
    """
    target = (1.0 - dropout) * (1.0 - hidden_dropout)
    if constants not in CONSTANTS:
        raise unknown("deepscale_constants", constants, CONSTANTS)
    if constants == "published" and gated:
        raise UserError("deepscale_constants=published: the paper's code has no gated feed-forward; use exact")
    if not gated and (activation == "relu" or constants == "published"):
        return (2.0 * target / (width * hidden)) ** 0.25

    def variance(s2: float) -> float:
        return hidden * s2 * _activated(activation, width * s2, 0.0).second_moment * (width * s2 if gated else 1.0)

    low, high = 1e-8 / width, 1e4 / width
    for _ in range(200):  # bisection on the logarithm, to the last bit
        middle = math.sqrt(low * high)
        if middle in (low, high):
            break
        low, high = (middle, high) if variance(middle) < target else (low, middle)
    return math.sqrt(low)


def feed_forward_correlation(
    std: float,
    width: int,
    activation: str = "relu",
    *,
    gated: bool = False,
    hidden_dropout: float = 0.0,
    constants: str = "exact",
) -> Callable[[float], float]:
    """r -> token correlation of the feed-forward's output before its dropout; K(r) for ReLU and for "published"."""
    if constants == "published" or (activation == "relu" and not gated):
        return lambda r: (1.0 - hidden_dropout) * relu_raw_correlation(r)

    # The two factors of a gated unit are independent given the input, so their raw correlations multiply.
    def correlation(r: float) -> float:
        raw = _activated(activation, width * std**2, r).raw_correlation
        return (1.0 - hidden_dropout) * raw * (r if gated else 1.0)

    return correlation


@dataclass(frozen=True)
class Correlations:
    """Token correlation of a stack's stream before each branch, by layer, and after the last."""

    inputs: tuple[tuple[float, ...], ...]
    output: float


def correlation_recursion(
    layers: Sequence[Sequence[tuple[float, Callable[[float], float]]]],
    r0: float,
    constants: ResidualConstants,
    *,
    embedding_dropout: float = 0.0,
) -> Correlations:
    """Follow the token correlation through a stack (authors' code, exactly, for attention then feed-forward).

        r = r0 (1 - p_embedding), s = 1;   after each branch   r <- (lambda^2 r s + beta^2 (1 - p) c(r)) / s'
                                                               s <- s' = lambda^2 s + beta^2

    Args:
        layers: for each layer its branches as (dropout p, c); c(r) is the correlation of the branch before dropout:
            1 for attention over many tokens, c / m of `attention_share` over fewer, `feed_forward_correlation`.
        r0: of the embedding before its dropout; below `CORRELATION_FLOOR` that floor is taken.
    """
    if not r0 <= 1.0:
        raise UserError(f"embedding_correlation: expected a correlation of at most 1, got {r0:g}")
    stream2, branch2 = constants.stream_scale**2, constants.branch_scale**2
    r, s = max(r0, CORRELATION_FLOOR) * (1.0 - embedding_dropout), 1.0
    inputs = []
    for branches in layers:
        seen = []
        for dropout, correlation in branches:
            seen.append(r)
            total = stream2 * s + branch2
            r = (stream2 * r * s + branch2 * (1.0 - dropout) * correlation(r)) / total
            s = total
        inputs.append(tuple(seen))
    return Correlations(tuple(inputs), r)


def simplified_std(fan_in: int, dropout: float = 0.0) -> float:
    """sqrt(sqrt((1 - p) / 2) / d) for V, O and both feed-forward matrices (third-party reading of the paper).

    Without the recursion an attention branch has variance r / 2 instead of 1, and the Pre-LN stream settles at 0.56 to
    0.73, whatever the depth (derived and measured by us).
    """
    return math.sqrt(math.sqrt((1.0 - dropout) / 2.0) / fan_in)
