"""The published single-head attention (arXiv 2403.09635), for comparison only. Imports no torch.

Right for weak scores (deviation up to about 1); its gradient leaves out the query/key path. `attention.py` has ours.
The formulas are those of DeepScaleLM (arXiv 2403.09635), read in the authors' simulation code.
"""

from __future__ import annotations

import math

from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import Matrix


def published_attention(
    x: Moments, query: Matrix, key: Matrix, value: Matrix, *, tokens: int, dropout: float = 0.0
) -> Moments:
    """Moments of one head's weighted values, x of mean 0. With c = var_q var_k, S = d^2 c sigma^4, own = 1 - r:

    variance   = d var_v {r sigma^2 + [pull (L-1) + e^{own S}/(1-p) (4 pull + own sigma^2)] / L}
    covariance = d var_v {r sigma^2 + [2 pull + own sigma^2] / L},    pull = own^2 d c sigma^6
    """
    d, c, s2, r = value.fan_in, query.variance * key.variance, x.variance, x.correlation
    own, cubic = 1.0 - r, d * c * x.variance**3
    pull = own**2 * cubic
    scores = d**2 * c * s2**2
    noise = math.exp(own * scores) / (1.0 - dropout) * (4.0 * pull + own * s2)
    gain = d * value.variance
    return Moments(
        0.0,
        gain * (r * s2 + (pull * (tokens - 1) + noise) / tokens),
        gain * (r * s2 + (2.0 * pull + own * s2) / tokens),
    )


def published_attention_backward(
    g: GradientMoments, value: Matrix, *, tokens: int, dropout: float = 0.0
) -> GradientMoments:
    """The published gradient by the input: the value path alone, for equal weights.

    variance   = sigma_g^2 d_out var_v (1 + (L-1) r_g (1-p)) / (L (1-p))
    covariance = sigma_g^2 d_out var_v (1 + (L-1) r_g) / L
    """
    gain, r = g.variance * value.fan_out * value.variance, g.correlation
    kept = 1.0 - dropout
    return GradientMoments(
        gain * (1.0 + (tokens - 1) * r * kept) / (tokens * kept), gain * (1.0 + (tokens - 1) * r) / tokens
    )
