"""LASER's read log(A exp V) (arXiv 2411.03493) of softmax weights. Derived here; imports no torch.

Of one feature with values common + v_j, v_j normal of variance w = d var_v own,

    out = common + log sum_j e^{z_j + v_j} - log sum_j e^{z_j}

Both sums are of normal exponents: deviation s of the scores, and S = sqrt(s^2 + w) of scores and value together.
Hence E out = E log Z(S) - E log Z(s), exactly; it is positive, so the output matrix meets a mean. d out / d v_j =
b_j, softmax of z + v, and d out / d z_j = b_j - a_j. For functions F, F' of normal variables Cov(F, F') = int_0^1 dt
E grad F . grad F'^t, where ^t has correlation t with the rest, turns these into variances through the overlaps of
`rows.py`:

    Var out = int_0^1 dt { w bb(t) + s^2 [bb(t) - 2 ab(t) + aa(t)] }

and the backward pass needs no more: E sum_j (d out / d v_j)^2 = E sum b^2, E sum_j dz_j^2 = head_dim G E sum_j (b_j -
a_j)^2.
"""

from __future__ import annotations

import numpy as np

from clearhead.signal.moments.attention_means import row_means
from clearhead.signal.moments.flow import Flow, ScoreResponse, Setting
from clearhead.signal.moments.mean_read import statistics
from clearhead.signal.moments.rows import BOTH_KEPT, KEPT, SQUARES, Overlap
from clearhead.signal.moments.scores import norm_points, query_pairs
from clearhead.signal.moments.types import Moments


def laser_read(s: Setting) -> Flow:
    """The flow of log(softmax(scores) exp(V))."""
    shared, own = s.value_parts
    value, z, table = s.shape.value, s.scores, s.table
    d, gain = value.fan_in, value.fan_in * value.variance
    w, lean = gain * own, gain * s.leaning

    # One row, over the norms of the queries.
    chi, weight = norm_points(z.norm_freedom)
    s2 = z.variance * chi
    narrow, wide = np.sqrt(s2), np.sqrt(s2 + w)
    aa, bb = Overlap.of(table.same(narrow)), Overlap.of(table.same(wide))
    ab, turn = aa.blend(bb), narrow / np.maximum(wide, 1e-12)
    one = np.ones_like(chi)
    noise = float(weight @ (w * bb.mean(one) + s2 * (bb.mean(one) - 2.0 * ab.mean(turn) + aa.mean(one))))
    rows, rows_wide = table.rows(narrow), table.rows(wide)
    moved = np.maximum(rows_wide[:, SQUARES] + rows[:, SQUARES] - 2.0 * ab.value(turn), 0.0)
    squares, kept = float(weight @ rows_wide[:, SQUARES]), float(weight @ rows_wide[:, KEPT])
    drift = (np.sqrt(np.maximum(rows_wide[:, KEPT], 0.0)) - np.sqrt(np.maximum(rows[:, KEPT], 0.0))) ** 2

    # The mean, which differs by the number of keys, by the query's norm and by the feature's |W_v|^2.
    means_kn = table.log_sums(wide) - table.log_sums(narrow)
    means_n = weight @ means_kn
    mean = float(table.node_weights @ means_n)
    by_place = float(table.node_weights @ (means_n - mean) ** 2)
    by_norm = float(table.node_weights @ (weight @ (means_kn - means_n) ** 2))
    by_feature = (1.0 - squares) ** 2 * w**2 / (2.0 * d)

    # Two rows, over norms and angles.
    turns = np.array(z.turns)
    product_tk, cosine_tk, dot_tk, weight_k = query_pairs(z.query_correlation * turns, z.freedom)
    weight_tk = weight_k / len(turns)
    s2_tk = z.variance * product_tk
    narrow_tk, wide_tk = np.sqrt(s2_tk), np.sqrt(s2_tk + w)
    columns_b = table.pairs(wide_tk)
    pair_a, pair_b = Overlap.of(table.pairs(narrow_tk)), Overlap.of(columns_b)
    pair_ab = pair_a.blend(pair_b)
    rho_b = (cosine_tk * s2_tk + w) / np.maximum(wide_tk**2, 1e-12)
    rho_ab = cosine_tk * narrow_tk / np.maximum(wide_tk, 1e-12)
    both = pair_b.value(rho_b)
    moved_tk = both + pair_a.value(cosine_tk) - 2.0 * pair_ab.value(rho_ab)
    score_part = pair_b.mean(rho_b) - 2.0 * pair_ab.mean(rho_ab) + pair_a.mean(cosine_tk)
    together = float((weight_tk * (w * pair_b.mean(rho_b) + s2_tk * cosine_tk * score_part)).sum())
    overlap = float((weight_tk * both).sum())
    kept_tk = columns_b[..., BOTH_KEPT]
    kept_pair = float((weight_tk * kept_tk).sum())
    pulled = float((weight_tk * kept_tk * s2_tk * cosine_tk).sum())

    base = gain * shared + value.bias_variance + by_feature
    variance = base + noise + by_place + by_norm + lean * z.variance * kept / d
    covariance = base + together - by_place / max(s.queries - 1, 1) + lean * pulled / d
    covariance += by_norm * z.query_correlation**2
    head_dim, common = s.shape.head_dim, s.shape.head_dim * lean
    mean_t = (z.query_correlation * turns)[:, None]
    by_key, by_input = min(z.freedom / s.shape.key.fan_in, 1.0), min(z.freedom / s.shape.query.fan_in, 1.0)
    shift_tk = dot_tk - mean_t
    dot_tk = dot_tk * z.steadiness
    turned_tk = turns[:, None] * weight_tk
    moved_pair = head_dim * float((turned_tk * moved_tk).sum())
    toward = head_dim * float(weight @ (s2 * drift)) * (s.leaning / own if own > 0.0 else 0.0)
    response = ScoreResponse(
        row=head_dim * float(weight @ moved),
        row_query=head_dim * float(weight @ (chi * moved)),
        along=common * kept,
        along_weighted=common * float(weight @ (chi * rows_wide[:, KEPT])),
        toward=toward + head_dim * float(weight @ moved) + common * kept / d,
        pair=moved_pair,
        pair_key=head_dim * float((weight_tk * dot_tk * moved_tk).sum()),
        pair_query=head_dim * float((weight_tk * (dot_tk - by_key * shift_tk) * moved_tk).sum()),
        pair_input=head_dim * float((turned_tk * (s.x.raw_correlation + by_input * shift_tk) * moved_tk).sum()),
        pair_along=common * kept_pair,
        pair_along_query=common * kept_pair * z.query_correlation,
        pair_toward=moved_pair + common * kept_pair / d + toward * z.query_correlation,
    )
    return Flow(
        mix=Moments(mean, variance, covariance),
        stats=statistics(s, row_means(table, z)),
        squares=squares,
        overlap=overlap,
        sum_square=1.0,
        sum_overlap=1.0,
        mixed_variance=d * (shared + own * squares) + (own * w + s.leaning * z.variance) * kept,
        mixed_covariance=d * (shared + own * overlap) + own * w * kept_pair + s.leaning * pulled,
        response=response,
        notes=("laser: dropout on the weights is left out, as the mechanism refuses it",) if s.dropout else (),
    )
