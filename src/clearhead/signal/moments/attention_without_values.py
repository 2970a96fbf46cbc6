"""The attention matrix applied to the input itself (no value and output matrices). Imports no torch."""

from __future__ import annotations

from clearhead.signal.moments.attention import AttentionMoments, attention
from clearhead.signal.moments.types import Moments
from clearhead.signal.skeleton import AttentionShape, Matrix


def attention_without_values(
    x: Moments,
    query: Matrix,
    key: Matrix,
    *,
    tokens: int,
    causal: bool = False,
    dropout: float = 0.0,
    training: bool = True,
) -> AttentionMoments:
    """Moments of softmax(q k^T / sqrt(d_k)) x, in `.output`; `attention_backward` takes what this returns.

    It is a single head whose value and output matrices keep lengths on average: their mean is the identity's answer,
    as all that the theory needs of them is their sizes. (Their own weight gradients mean nothing here.) For many
    tokens and weak scores variance = covariance = r sigma^2, the published limit.
    """
    shape = AttentionShape(
        heads=1,
        kv_heads=1,
        head_dim=query.fan_out,
        query=query,
        key=key,
        value=Matrix(key.fan_in, query.fan_out, 1.0 / query.fan_out),
        output=Matrix(query.fan_out, query.fan_in, 1.0 / query.fan_in),
        causal=causal,
        dropout=dropout,
    )
    return attention(x, shape, width=query.fan_in, tokens=tokens, training=training)
