"""The embedding: the sum of independent tables, and how often two tokens read the same row.

The tables are the first source of token correlation: tokens repeat (Zipf), segments are shared, positions never are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from clearhead.signal.moments.types import Moments

EULER = 0.5772156649015329


def embedding(variances: Sequence[float], correlations: Sequence[float]) -> Moments:
    """Return the moments of the sum of tables: one row of each table per token.

        variance = sum_i v_i        covariance = sum_i c_i v_i

    v_i is the mean square of table i, c_i the probability that two different tokens of a sequence read the same row of
    it: `repetition` for tokens, 0 for positions, `segment_repetition()` for two segments. Rows are independent and of
    mean 0. Derived by us for DeepScaleLM's setting (arXiv 2403.09635).

    `ValueError` when the two lists differ in length or a value is out of range.
    """
    if len(variances) != len(correlations):
        raise ValueError(f"expected one correlation per table, got {len(variances)} tables and {len(correlations)}")
    if any(not v >= 0.0 for v in variances) or any(not 0.0 <= c <= 1.0 for c in correlations):
        raise ValueError(f"expected variances >= 0 and probabilities in [0, 1], got {variances} and {correlations}")
    return Moments(0.0, math.fsum(variances), math.fsum(c * v for c, v in zip(correlations, variances)))


def repetition(weights: ArrayLike) -> float:
    """Return sum_i p_i^2: the probability that two tokens, drawn independently, are the same.

    `weights` are counts or probabilities [vocabulary]; they are divided by their sum. Counts of n tokens give the
    plug-in value, which is high by about 1/n.
    """
    w = np.asarray(weights, dtype=float).ravel()
    total = float(w.sum())
    if w.size == 0 or not np.isfinite(total) or total <= 0.0 or bool((w < 0.0).any()):
        raise ValueError("expected counts or probabilities >= 0 with a positive finite sum")
    return float(np.square(w / total).sum())


@lru_cache(maxsize=64)
def zipf_repetition(vocab_size: int) -> float:
    """Return sum p_i^2 for p_i proportional to 1/i over a vocabulary, summed exactly (not by the logarithm)."""
    if vocab_size < 1:
        raise ValueError(f"expected a vocabulary of at least 1, got {vocab_size}")
    return repetition(1.0 / np.arange(1, vocab_size + 1, dtype=float))


def segment_repetition() -> float:
    """Return 2/3: the probability that two tokens share a segment when the cut is uniform.

    Exact for every length T when the first segment has a length uniform on 0, 1, ..., T (derived by us).
    """
    return 2.0 / 3.0


def published_correlation(vocab_size: int, *, with_euler: bool = False) -> float:
    """Return r0 = pi^2 / (18 ln^2 V) + 2/9: token, position and segment table of equal variance, Zipf tokens.

    The formula is recalled from the paper, not re-read, and derived again.
    `with_euler` replaces ln V by ln V + 0.5772, which a referee asked for and which is nearer to the sum. The authors'
    code has the number 0.221. For other tables use `embedding`: without segments r0 is far smaller.
    """
    if vocab_size < 2:
        raise ValueError(f"expected a vocabulary of at least 2, got {vocab_size}")
    log = math.log(vocab_size) + (EULER if with_euler else 0.0)
    return math.pi**2 / (18.0 * log**2) + 2.0 / 9.0
