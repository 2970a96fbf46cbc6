"""Attention written out, with fresh Gaussian weights and autograd; knows nothing of the formulas.

Shapes: b sequences, h heads, n queries, m keys, d head dim, w width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from clearhead.attention.reference import DENSE_WEIGHTS
from clearhead.attention.spec import AttentionSpec, Laser, Window
from clearhead.signal.skeleton import AttentionShape, Matrix
from experiments.moment_formulas.draw import equicorrelated, second_moments_of

DRAWS = 12
"""Draws of weights; half as many for long sequences."""


def sequences(tokens: int) -> int:
    """Sequences for each draw of weights; fewer long ones, which average over more tokens."""
    return max(2, min(6, 768 // tokens))


@dataclass(frozen=True)
class Inputs:
    """Moments of what is drawn."""

    tokens: int
    r: float
    r_g: float
    mean: float = 0.0
    context_tokens: int = 0
    context_r: float = 0.0


def simulate_attention(
    shape: AttentionShape, inputs: Inputs, generator: Generator, draws: int = DRAWS
) -> dict[str, float]:
    """Moments of the output (after the output matrix) and of the gradients by the input, and the weights' gradients."""
    draws = DRAWS if inputs.tokens <= 128 else DRAWS // 2
    runs = [_draw(shape, inputs, generator) for _ in range(draws)]
    return {name: sum(run[name] for run in runs) / draws for name in runs[0]}


def _draw(shape: AttentionShape, inputs: Inputs, generator: Generator) -> dict[str, float]:
    batch = sequences(inputs.tokens)
    size = (batch, inputs.tokens, shape.query.fan_in)
    x = equicorrelated(size, inputs.mean, 1.0, inputs.r, generator).requires_grad_()
    y = x
    if shape.cross:
        context_size = (batch, inputs.context_tokens, shape.key.fan_in)
        y = equicorrelated(context_size, 0.0, 1.0, inputs.context_r, generator).requires_grad_()
    weights = [_weight(m, generator) for m in (shape.query, shape.key, shape.value, shape.output)]
    g = equicorrelated((batch, inputs.tokens, shape.output.fan_out), 0.0, 1.0, inputs.r_g, generator)
    mix = written_out(shape, x, y, weights, generator)
    out = mix @ weights[3].T
    by_x, *rest = torch.autograd.grad((out * g).sum(), [x, *([y] if shape.cross else []), *weights])
    found = {
        **second_moments_of(out.detach()),
        **second_moments_of(by_x, "gradient_"),
        "mix_mean": float(mix.detach().double().mean()),
    }
    if shape.cross:
        found.update(second_moments_of(rest.pop(0), "context_gradient_"))
    for name, gradient in zip(("query", "key", "value", "output"), rest, strict=True):
        found[f"{name}_weight_gradient"] = float(gradient.double().square().sum()) / batch
    return found


def _weight(matrix: Matrix, generator: Generator) -> Tensor:
    drawn = torch.randn(matrix.fan_out, matrix.fan_in, generator=generator)
    return drawn.mul_(math.sqrt(matrix.variance)).requires_grad_()


def written_out(shape: AttentionShape, x: Tensor, y: Tensor, weights: list[Tensor], generator: Generator) -> Tensor:
    """The heads' weighted values [b, n, h * d]."""
    spec = AttentionSpec.parse(shape.spec)

    def heads(z: Tensor, weight: Tensor, count: int) -> Tensor:
        return (z @ weight.T).unflatten(-1, (count, -1)).transpose(1, 2)

    group = shape.heads // shape.kv_heads
    q = heads(x, weights[0], shape.heads)
    k = heads(y, weights[1], shape.kv_heads).repeat_interleave(group, dim=1)
    v = heads(y, weights[2], shape.kv_heads).repeat_interleave(group, dim=1)
    if shape.qk_norm:
        q, k = (t * t.square().mean(-1, keepdim=True).rsqrt() for t in (q, k))
    if shape.rope_base is not None:
        q, k = _rotated(q, shape.rope_base), _rotated(k, shape.rope_base)
    scale = shape.scale if shape.scale is not None else shape.head_dim**-0.5
    scores_bhnm = q @ k.mT * scale
    visible_nm = torch.ones(scores_bhnm.shape[-2:], dtype=torch.bool)
    if shape.causal:
        visible_nm = visible_nm.tril()
    if isinstance(spec.pattern, Window):
        visible_nm = visible_nm.triu(1 - spec.pattern.size)
    visible = visible_nm.expand_as(scores_bhnm)
    if isinstance(spec.read, Laser):
        log_a = scores_bhnm.masked_fill(~visible, -math.inf).log_softmax(dim=-1)
        out = torch.logsumexp(log_a.unsqueeze(-1) + v.unsqueeze(-3), dim=-2)
    else:
        a = DENSE_WEIGHTS[type(spec.weights)](spec.weights, scores_bhnm, visible)
        keep = torch.rand(a.shape, generator=generator) >= shape.dropout
        out = (a * keep / (1.0 - shape.dropout)) @ v
    return out.transpose(1, 2).flatten(2)


def _rotated(z_bhnd: Tensor, base: float) -> Tensor:
    half = z_bhnd.shape[-1] // 2
    theta = base ** (-torch.arange(half) / half)
    angle = torch.arange(z_bhnd.shape[-2])[:, None] * theta
    one, two = z_bhnd[..., :half], z_bhnd[..., half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([one * cos - two * sin, one * sin + two * cos], dim=-1)


def simulate_softmax(count: int, sigma: float, r: float, sigma_g: float, generator: Generator) -> dict[str, float]:
    """Softmax over `count` logits of deviation sigma, correlated by r, with independent gradients from above."""
    rows = max(400, 6_000_000 // count)
    total = {"mean": 0.0, "square": 0.0, "gradient": 0.0}
    done = 0
    while done < rows:
        part = min(rows - done, max(1, 2_000_000 // count))
        logits = math.sqrt(1.0 - r) * sigma * torch.randn(part, count, generator=generator)
        logits += math.sqrt(r) * sigma * torch.randn(part, 1, generator=generator)
        a = logits.requires_grad_().softmax(-1)
        g = sigma_g * torch.randn(part, count, generator=generator)
        (by_logits,) = torch.autograd.grad((a * g).sum(), logits)
        total["mean"] += float(a.detach().double().sum())
        total["square"] += float((a.detach().double() - 1.0 / count).square().sum())
        total["gradient"] += float(by_logits.double().square().sum())
        done += part
    elements = rows * count
    return {
        "mean": total["mean"] / elements,
        "variance": total["square"] / elements,
        "gradient_variance": total["gradient"] / elements,
    }
