"""Gradient moments of attention: the value path and the query/key path. Imports no torch.

g is the gradient at the mix (variance G, covariance G_c), independent of the forward values. With h_ij = g_i . v_j and
J_i = diag(a_i) - a_i a_i^T,

    values    dv_j = sum_i a_ij g_i
    scores    dz_ij = a_ij (h_ij - sum_k a_ik h_ik) = (J_i h_i)_j,       E sum_j dz_ij^2 = eta^2 E ||J_i||^2
    queries   dq_i = scale sum_j dz_ij k_j,        keys    dk_j = scale sum_i dz_ij q_i

eta^2 = head_dim G d var_v own is the variance of h within a row. Rows of weights sum to 1 and rows of dz to 0: that
conserves sum_j dv_j = sum_i g_i and gives sum_j dk_j = 0, hence the covariances. Two rows i, i' enter through E sum_j
dz_ij dz_i'j = eta^2 r_g E tr(J_i J_i') = eta^2 r_g overlap'(rho) / s^2, which a key collects from n - 1 rows: where
gradients are correlated over tokens this, not the row's own term, is most of the query/key path. Derivation, and
where it is how far off: docs/attention-moments.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from clearhead.signal.moments.attention import AttentionMoments
from clearhead.signal.moments.flow import ScoreResponse, Setting
from clearhead.signal.moments.types import GradientMoments


@dataclass(frozen=True)
class AttentionGradients:
    """Gradients of the loss by what attention read, and by its matrices."""

    input: GradientMoments
    """By x: query path, and key and value paths unless they lead to the context."""
    context: GradientMoments | None
    """By the context of a cross attention."""
    matrices: dict[str, float]
    """E ||dL/dW||_F^2 per sequence: query, key, value, output."""
    value_path: GradientMoments
    query_path: GradientMoments
    key_path: GradientMoments


def attention_backward(g: GradientMoments, forward: AttentionMoments) -> AttentionGradients:
    """Gradient moments by the input of `forward`, from `g` at its output (after the output matrix).

    Weight gradients are per sequence, summed over its tokens; over a batch of b independent sequences multiply by b.
    """
    s, flow = forward.setting, forward.flow
    output = s.shape.output
    at_mix = g.scaled(output.fan_out * output.variance)
    value_path = _value_path(at_mix, forward)
    query_path = _query_path(at_mix, flow.response, s)
    key_path = _key_path(at_mix, flow.response, s)
    width = s.shape.heads * s.shape.head_dim
    matrices = {
        "query": _query_matrix(at_mix, flow.response, s),
        "key": _key_matrix(at_mix, flow.response, s),
        "value": width
        * _tokens(s.queries, at_mix.variance * flow.mixed_variance, at_mix.covariance * flow.mixed_covariance),
        "output": width
        * output.fan_out
        * _tokens(s.queries, g.variance * flow.mix.second_moment, g.covariance * flow.mix.raw_covariance),
    }
    if s.shape.cross:
        return AttentionGradients(query_path, value_path + key_path, matrices, value_path, query_path, key_path)
    return AttentionGradients(value_path + query_path + key_path, None, matrices, value_path, query_path, key_path)


def _tokens(n: int, same: float, different: float) -> float:
    """Sum over all pairs of n tokens."""
    return n * same + n * (n - 1.0) * different


def _from_total(variance: float, total: float, n: int) -> GradientMoments:
    """The moments of n tokens whose sum has the second moment `total`."""
    return GradientMoments(variance, (total - n * variance) / (n * (n - 1.0)) if n > 1 else 0.0)


def _value_path(g: GradientMoments, forward: AttentionMoments) -> GradientMoments:
    s, flow = forward.setting, forward.flow
    per_key = _tokens(s.queries, g.variance * flow.squares, g.covariance * flow.overlap) / s.keys
    conserved = _tokens(s.queries, g.variance * flow.sum_square, g.covariance * flow.sum_overlap)
    path = _from_total(per_key, conserved, s.keys)
    gain = s.shape.heads * s.shape.head_dim * s.shape.value.variance
    mean2 = s.temperature.value_mean**2
    return GradientMoments(
        gain * (mean2 + s.temperature.value_variance) * path.variance, gain * mean2 * path.covariance
    )


def _query_path(g: GradientMoments, dz: ScoreResponse, s: Setting) -> GradientMoments:
    """dx_i = scale W_q^T W_k D_i.

    W_k = q p^T / |q|^2 + the rest, p = W_k^T q: what D_i has along p comes back along q, times |p|/|q|, far more than
    along the other head_dim - 1 directions, which is all that the rest of D_i reaches. W_q with q = W_q x is alike.
    """
    z, d, d_in, head_dim = s.scores, s.shape.key.fan_in, s.shape.query.fan_in, s.shape.head_dim
    gain = s.shape.heads * z.scale**2 * z.query_weight * z.key_weight
    aside = (head_dim - 1.0) * (1.0 - 1.0 / d_in)
    stretched = aside if s.shape.qk_norm else d * (1.0 + (head_dim - 1.0) / d_in) + aside
    shared = head_dim * d * max(s.y.raw_covariance, 0.0)
    variance = z.key_own * (aside * ((d - 1.0) * dz.row + dz.along) + stretched * dz.toward) + shared * dz.sums
    covariance = s.own * (aside * ((d - 1.0) * dz.pair + dz.pair_along) + stretched * dz.pair_toward)
    covariance += shared * dz.sums_pair
    return GradientMoments(gain * g.variance * variance, gain * g.covariance * covariance)


def _key_path(g: GradientMoments, dz: ScoreResponse, s: Setting) -> GradientMoments:
    """dx_j = scale W_k^T sum_i dz_ij q_i."""
    z, shape = s.scores, s.shape
    normed = (shape.head_dim - 1.0) / shape.head_dim if shape.qk_norm else 1.0
    gain = shape.heads * z.scale**2 * z.key_weight * shape.head_dim * z.query_square * normed
    variance = _tokens(s.queries, g.variance * dz.row_query, g.covariance * dz.pair_key) / s.keys
    total = _tokens(s.queries, g.variance * dz.sums_query, g.covariance * dz.sums_pair_key)
    total += (1.0 - z.key_turn) * s.keys * variance  # rotary positions turn the keys' gradients apart
    return _from_total(variance, total, s.keys).scaled(gain)


def _query_matrix(g: GradientMoments, dz: ScoreResponse, s: Setting) -> float:
    """sum_ii' (dq_i . dq_i')(x_i . x_i')."""
    z, d, head_dim = s.scores, s.shape.key.fan_in, s.shape.head_dim
    # dq before the temperature and QK-norm: their factors are in z.query_weight.
    factor = z.query_weight / s.shape.query.variance if s.shape.query.variance > 0.0 else 0.0
    gain = s.shape.heads * z.scale**2 * z.key_weight * factor
    aside, rho = head_dim - 1.0, s.x.raw_correlation
    stretched = aside if s.shape.qk_norm else d + aside
    shared = head_dim * d * max(s.y.raw_covariance, 0.0)
    same = z.key_own * (aside * ((d - 1.0) * dz.row + dz.along) + stretched * dz.toward) + shared * dz.sums
    pairs = s.own * (aside * ((d - 1.0) * dz.pair_input + dz.pair_along * rho) + stretched * dz.pair_toward * rho)
    pairs += shared * dz.sums_pair * rho
    sums = _tokens(s.queries, g.variance * same, g.covariance * pairs)
    return gain * s.shape.query.fan_in * s.x.second_moment * sums


def _key_matrix(g: GradientMoments, dz: ScoreResponse, s: Setting) -> float:
    """dL/dW_k = scale sum_i q_i D_i^T: what tokens share drops out, because sum_j dz_ij = 0."""
    z, d = s.scores, s.shape.key.fan_in
    factor = z.key_weight / s.shape.key.variance if s.shape.key.variance > 0.0 else 0.0  # of QK-norm
    gain = s.shape.heads * z.scale**2 * s.shape.head_dim * z.query_square * factor
    shared = d * max(s.y.raw_covariance, 0.0)
    same = z.key_own * ((d - 1.0) * dz.row_query + dz.along_weighted + dz.toward) + shared * dz.sums_query
    pairs = s.own * ((d - 1.0) * dz.pair_query + dz.pair_along_query) + shared * dz.sums_pair_key
    return gain * _tokens(s.queries, g.variance * same, g.covariance * pairs)
