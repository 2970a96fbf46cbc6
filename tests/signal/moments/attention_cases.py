"""Small attentions for the tests, and their simulation."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from experiments.moment_formulas.attention import inputs_of, predict_attention, shape_of
from experiments.moment_formulas.attention_simulation import simulate_attention

from clearhead.signal.moments.attention import AttentionMoments, attention
from clearhead.signal.moments.attention_backward import AttentionGradients, attention_backward
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import AttentionShape, Matrix

SMALL = {"d": 64.0, "d_k": 16.0, "heads": 4.0, "L": 48.0}


def shape(
    *,
    width: int = 64,
    heads: int = 4,
    kv_heads: int | None = None,
    spread: float = 1.0,
    r: float = 0.3,
    causal: bool = False,
    **more: object,
) -> AttentionShape:
    """Values and output keep variances; scores have the deviation `spread` within a row."""
    head_dim = width // heads
    kv = (kv_heads or heads) * head_dim
    variance = spread / (width * math.sqrt(1.0 - r))
    return AttentionShape(
        heads,
        kv_heads or heads,
        head_dim,
        Matrix(width, width, variance),
        Matrix(width, kv, variance),
        Matrix(width, kv, 1.0 / width),
        Matrix(width, width, 1.0 / width),
        causal,
        **more,  # type: ignore[arg-type]
    )


def both_ways(
    attention_shape: AttentionShape, *, tokens: int = 48, r: float = 0.3, r_g: float = 0.3, **more: object
) -> tuple[AttentionMoments, AttentionGradients]:
    """Forward from unit variance, backward from a unit gradient."""
    forward = attention(Moments.of(1.0, r), attention_shape, width=64, tokens=tokens, **more)  # type: ignore[arg-type]
    return forward, attention_backward(GradientMoments.of(1.0, r_g), forward)


def ratios(params: Mapping[str, float], seed: int = 0, replicas: int = 2) -> dict[str, float]:
    """Predicted over simulated; a covariance's difference over the predicted variance, plus 1."""
    predicted = predict_attention(params)
    runs = [
        simulate_attention(shape_of(params), inputs_of(params), torch.Generator().manual_seed(seed + k))
        for k in range(replicas)
    ]
    found = {}
    for name, value in predicted.items():
        if name not in runs[0]:
            continue
        simulated = sum(run[name] for run in runs) / replicas
        if name.endswith("covariance"):
            reference = predicted[name.replace("covariance", "variance")]
            found[name] = 1.0 + (value - simulated) / reference
        else:
            found[name] = value / simulated if simulated else 1.0
    return found
