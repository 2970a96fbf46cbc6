"""Means over rows and pairs of rows for given scores: the tables of `rows.py` over the queries' norms and angles."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clearhead.signal.moments.laplace import Array
from clearhead.signal.moments.rows import (
    BOTH_KEPT,
    ENTROPY,
    JACOBIAN,
    KEPT,
    LARGEST,
    LEAN,
    PULL,
    SPREAD,
    SQUARES,
    Overlap,
    RowTable,
    row_table,
)
from clearhead.signal.moments.scores import Scores, norm_points, query_pairs

FARTHEST, POINTS = 1e4, 2500
"""Largest deviation of the scores told apart, and the number of grid points up to it."""


@dataclass(frozen=True)
class RowMeans:
    """Means over rows; see `RowTable.rows`. Names with `_q` are weighted by |q|^2 over its mean."""

    squares: float
    jacobian: float
    kept: float
    pull: float
    lean: float
    spread: float
    entropy: float
    largest: float
    jacobian_q: float
    kept_q: float
    lean_q: float


@dataclass(frozen=True)
class PairMeans:
    """Means over pairs of different rows; c is the cosine of the two queries, turned where positions are rotary."""

    overlap: float
    """E sum_j a_j b_j."""
    coherent: float
    """E c (1 - P)(1 - P') s^2: product of the two rows' pulls along their queries."""
    jacobians: float
    """E kappa tr(J J')."""
    jacobians_key: float
    """E (|p||p'| / mean) c tr(J J'), p = W_k^T q turned by its position: the direction that makes the scores."""
    jacobians_query: float
    """E (|q||q'| / mean) cos(q, q') tr(J J')."""
    jacobians_input: float
    """E cos(x, x') tr(J J')."""
    kept: float
    """E kappa (1 - P)(1 - P')."""
    kept_query: float
    """E c (1 - P)(1 - P')."""


def row_means(table: RowTable, scores: Scores) -> RowMeans:
    """Average over the norms of the queries."""
    means = _averaged(table.keys, table.causal, table.window, scores.norm_freedom)
    place = np.arcsinh(min(float(np.sqrt(scores.variance)), FARTHEST)) * means[0]
    left = min(int(place), len(means[1]) - 2)
    values = means[1][left] + (place - left) * (means[1][left + 1] - means[1][left])
    return RowMeans(*(float(v) for v in values))


@lru_cache(maxsize=64)
def _averaged(keys: int, causal: bool, window: int | None, freedom: float) -> tuple[float, Array]:
    """(points per unit of arcsinh s, columns of RowMeans on that grid)."""
    table = row_table(keys, causal, window)
    chi, weight = norm_points(freedom)
    at = np.linspace(0.0, np.arcsinh(FARTHEST), POINTS)
    rows = table.rows(np.sinh(at)[:, None] * np.sqrt(chi))
    plain = np.tensordot(rows, weight, axes=(1, 0))
    heavy = np.tensordot(rows, weight * chi, axes=(1, 0))
    order = [SQUARES, JACOBIAN, KEPT, PULL, LEAN, SPREAD, ENTROPY, LARGEST]
    both = np.concatenate([plain[:, order], heavy[:, [JACOBIAN, KEPT, LEAN]]], axis=1)
    return (POINTS - 1.0) / float(at[-1]), both


def pair_means(table: RowTable, scores: Scores, input_dim: int, key_dim: int, input_correlation: float) -> PairMeans:
    """Average over the norms of two queries and the angle between them."""
    rho, turns = scores.query_correlation, np.array(scores.turns)
    product_tk, cosine_tk, dot_tk, weight_k = query_pairs(rho * turns, scores.freedom)
    weight_tk = weight_k / len(turns)
    spread2_tk = scores.variance * product_tk
    columns = table.pairs(np.sqrt(spread2_tk))
    overlap = Overlap.of(columns)
    if scores.variance > 1e-8:
        jacobians_tk = overlap.slope(cosine_tk) / spread2_tk
    else:  # the slope is s^2 tr(J J'), and s = 0
        jacobians_tk = np.full_like(product_tk, table.flat_jacobians)
    # The cosine of p and p' fluctuates by the inputs (1/d of 1/freedom), by W_q and by W_k (1/d).
    mean_t = (rho * turns)[:, None]
    by_input, by_key = min(scores.freedom / input_dim, 1.0), min(scores.freedom / key_dim, 1.0)
    shift_tk = dot_tk - mean_t
    dot_tk = dot_tk * scores.steadiness
    kept_tk = columns[..., BOTH_KEPT]
    turned = turns[:, None] * weight_tk
    return PairMeans(
        overlap=float((weight_tk * overlap.value(cosine_tk)).sum()),
        coherent=float((weight_tk * dot_tk * kept_tk).sum()) * scores.variance,
        jacobians=float((turned * jacobians_tk).sum()),
        jacobians_key=float((weight_tk * dot_tk * jacobians_tk).sum()),
        jacobians_query=float((weight_tk * (dot_tk - by_key * shift_tk) * jacobians_tk).sum()),
        jacobians_input=float((turned * (input_correlation + by_input * shift_tk) * jacobians_tk).sum()),
        kept=float((turned * kept_tk).sum()),
        kept_query=float((weight_tk * (dot_tk - by_key * shift_tk) * kept_tk).sum()),
    )
