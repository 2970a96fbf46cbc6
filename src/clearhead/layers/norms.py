"""The two norms, by name. Both are torch's own modules."""

from __future__ import annotations

import torch.nn as nn

# Stated instead of torch's default (the dtype's own epsilon), so that bf16 and fp32 normalise alike.
RMS_EPS = 1e-6
LAYER_EPS = 1e-5


def make_norm(kind: str, size: int) -> nn.Module:
    """Return the norm `kind` ("rms" or "layer") over a last dimension of `size`.

    rms: x / sqrt(mean(x^2) + 1e-6) * weight (arXiv 1910.07467).
    layer: (x - mean) / sqrt(var + 1e-5) * weight + bias (arXiv 1607.06450).
    """
    if kind == "rms":
        return nn.RMSNorm(size, eps=RMS_EPS)
    if kind == "layer":
        return nn.LayerNorm(size, eps=LAYER_EPS)
    raise ValueError(f"norm: expected 'rms' or 'layer', got {kind!r}")
