"""Softmax weights and the plain mean A V. Imports no torch. Formulas: `attention.py`, `attention_backward.py`."""

from __future__ import annotations

from clearhead.signal.moments.attention_means import PairMeans, RowMeans, pair_means, row_means
from clearhead.signal.moments.flow import Flow, ScoreResponse, Setting
from clearhead.signal.moments.types import Moments
from clearhead.signal.trace import AttentionStats


def mean_read(s: Setting) -> Flow:
    """The flow of softmax(scores) V."""
    rows = row_means(s.table, s.scores)
    pairs = pair_means(s.table, s.scores, s.shape.query.fan_in, s.shape.key.fan_in, s.x.raw_correlation)
    shared, own = s.value_parts
    value, p, d = s.shape.value, s.dropout, s.shape.value.fan_in
    squares = rows.squares / (1.0 - p)
    sum_square = 1.0 + rows.squares * p / (1.0 - p)
    variance = shared * sum_square + own * squares + s.leaning * (rows.pull - rows.squares) / d
    covariance = shared + own * pairs.overlap + s.leaning * pairs.coherent / d
    gain, bias = d * value.variance, value.bias_variance
    return Flow(
        mix=Moments(0.0, gain * variance + bias * sum_square, gain * covariance + bias),
        stats=statistics(s, rows),
        squares=squares,
        overlap=pairs.overlap,
        sum_square=sum_square,
        sum_overlap=1.0,
        mixed_variance=d * variance,
        mixed_covariance=d * covariance,
        response=_response(s, rows, pairs),
    )


def statistics(s: Setting, rows: RowMeans) -> AttentionStats:
    """The statistics of the softmax itself. The score variance is the one over a row's visible keys, divided by n."""
    return AttentionStats(
        score_variance=s.scores.true_variance * (1.0 - s.table.inverse_keys),
        entropy=rows.entropy,
        uniform_entropy=s.table.uniform_entropy,
        largest_weight=rows.largest,
        participation=rows.squares,
        jacobian_gain=rows.jacobian,
    )


def _response(s: Setting, rows: RowMeans, pairs: PairMeans) -> ScoreResponse:
    shared, own = s.value_parts
    value, p, d = s.shape.value, s.dropout, s.shape.value.fan_in
    unit = s.shape.head_dim * d * value.variance
    eta2 = unit * own
    # Dropout multiplies each h by an independent 0 or 1/(1-p): then also the values' shared part differs by key.
    noisy = (eta2 + p * (unit * shared + s.shape.head_dim * value.bias_variance)) / (1.0 - p)
    # Along W_v^T g only that counts which scores and values both see of y's own part.
    common = unit * s.leaning
    # One of d directions of h is the query's own; along it the scores, not only the values, differ.
    flatness = min(rows.lean / rows.jacobian, 1.0) if rows.jacobian > 0.0 else 1.0
    aside = eta2 * (1.0 - 2.0 / d * (1.0 - flatness))
    # Of two rows each lacks something along its own query only; these they share by the cosine of the queries.
    cosine = s.scores.query_correlation
    lost = max(rows.kept, 0.0) ** 0.5 - rows.spread
    along_both = max(rows.spread**2 - (1.0 - cosine) * lost**2, 0.0)
    toward_both = max(1.0 - (2.0 - cosine) * (1.0 - flatness), 0.0)
    return ScoreResponse(
        row=noisy * (rows.jacobian + (rows.lean - rows.jacobian) / d),
        row_query=noisy * (rows.jacobian_q + (rows.lean_q - rows.jacobian_q) / d),
        along=common * (rows.kept + rows.jacobian),
        along_weighted=common * (rows.kept_q + rows.jacobian_q),
        toward=noisy * rows.lean + common * rows.spread**2 / d,
        pair=aside * pairs.jacobians,
        pair_key=aside * pairs.jacobians_key,
        pair_query=aside * pairs.jacobians_query,
        pair_input=aside * pairs.jacobians_input,
        pair_along=common * pairs.kept,
        pair_along_query=common * pairs.kept_query,
        pair_toward=eta2 * pairs.jacobians * toward_both + common * along_both / d,
    )
