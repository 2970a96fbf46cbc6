"""Whole stacks at initialisation: what the tests of test_deep.py measure, with hooks of their own.

Data: tokens drawn from Zipf's law over 4,000 ids, two segments cut at a uniform place, learned positions (three tables,
BERT's first stream), train mode. The gradient of the output is independent unit noise: DeepScaleLM's worst case.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from clearhead.models.config import ModelConfig
from clearhead.models.encoder import Encoder

VOCABULARY = 4000


@dataclass(frozen=True)
class Measured:
    """Per residual sum in the order of depth: variance and token correlation of the stream that it receives; per layer:
    gradient norm of its matrices; the variance of the gradient at the first stream over that at the last."""

    variances: np.ndarray
    correlations: np.ndarray
    gradient_norms: np.ndarray
    gradient_factor: float

    @property
    def spread(self) -> float:
        return float(self.gradient_norms.max() / self.gradient_norms.min())


def measure(
    *, layers: int, width: int, seed: int, tokens: int = 64, batch: int = 4, backward: bool = True, **options: object
) -> Measured:
    settings = {"feed_forward": "relu", "norm": "layer", "dropout": 0.1, "position": "learned", "heads": 4} | options
    config = ModelConfig(
        architecture="encoder", vocab_size=VOCABULARY, context=tokens, layers=layers, width=width, segment_types=2,
        **settings,
    )  # fmt: skip
    model = Encoder(config)
    model.init_parameters(seed)
    model.train()
    generator = torch.Generator().manual_seed(seed)
    weights = 1.0 / torch.arange(1, VOCABULARY + 1)
    tokens_bt = torch.multinomial(weights, batch * tokens, replacement=True, generator=generator).view(batch, tokens)
    cut_b1 = torch.randint(0, tokens + 1, (batch, 1), generator=generator)
    segments_bt = (torch.arange(tokens) >= cut_b1).long()

    streams: list[torch.Tensor] = []
    hooks = []
    for block in model.blocks:
        for residual in (block.attention_residual, block.feed_forward_residual):
            hooks.append(residual.register_forward_pre_hook(lambda module, args: streams.append(args[0])))
    torch.manual_seed(seed)
    with torch.set_grad_enabled(backward):
        last = []
        hooks.append(model.blocks[-1].register_forward_hook(lambda module, args, out: last.append(out)))
        output = model.hidden(tokens_bt, segment_types=segments_bt)
    for hook in hooks:
        hook.remove()
    variances = np.array([float(x.detach().var()) for x in streams] + [float(last[0].detach().var())])
    correlations = np.array([token_correlation(x.detach()) for x in [*streams, *last]])
    norms, factor = np.ones(layers), float("nan")
    if backward:
        streams[0].retain_grad()
        last[0].retain_grad()
        (output * torch.randn(output.shape, generator=generator)).sum().backward()
        norms = np.array(
            [
                sum(float(p.grad.square().sum()) for p in block.parameters() if p.dim() > 1) ** 0.5
                for block in model.blocks
            ]
        )
        factor = float(streams[0].grad.var() / last[0].grad.var())
    return Measured(variances, correlations, norms, factor)


def token_correlation(x_btw: torch.Tensor) -> float:
    """Centred: the mean over pairs of tokens of one sequence, over the variance."""
    x = (x_btw - x_btw.mean()).double()
    tokens = x.shape[1]
    together = x.sum(dim=1).square().sum() - x.square().sum()
    return float(together / (tokens - 1) / x.square().sum())
