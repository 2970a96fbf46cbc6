"""Models whose every parameter matters."""

from __future__ import annotations

import torch


@torch.no_grad()
def stir(model: torch.nn.Module, seed: int) -> None:
    """Large matrices, and vectors off their start, float64: by the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        if parameter.dim() > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.add_(0.3 * noise)
