"""What a hook keeps of an activation: a few sums, taken at once, so that no activation outlives its own forward.

Every sum is taken in float32 (float64 for a float64 model) after a division by the largest entry, so that neither a
stream of 1e20 nor a gradient of 1e-26 leaves the range. Legend: b batch, t tokens, w width, r sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clearhead.attention.precision import without_autocast, working_dtype
from clearhead.signal.moments.types import GradientMoments, Moments


@dataclass(frozen=True, eq=False)
class Seen:
    """Which tokens of a stack count, and how many there are; `valid_bt1` is None when all do."""

    batch: int
    tokens: int
    valid_bt1: Tensor | None
    count: int
    """Valid tokens."""
    pairs: int
    """Ordered pairs of different valid tokens of one sequence."""
    rank_rows: Tensor
    """[s, r] int64: sampled valid tokens of the sequences `rank_batch`."""
    rank_batch: Tensor
    """[s] int64."""

    @classmethod
    def of(cls, batch: int, tokens: int, valid_bt: Tensor | None, rows: int, seed: int, device: torch.device) -> Seen:
        """Count the tokens, and draw at most `rows` of each of at most `RANK_SEQUENCES` sequences of equal length."""
        if valid_bt is None:
            counts = [tokens] * batch
        else:
            counts = valid_bt.sum(dim=1).tolist()
        generator = torch.Generator().manual_seed(seed)
        chosen = sorted(range(batch), key=lambda i: (-counts[i], i))[:RANK_SEQUENCES]
        size = min(rows, counts[chosen[-1]]) if chosen else 0
        drawn = []
        for index in chosen:
            places = torch.arange(tokens) if valid_bt is None else valid_bt[index].cpu().nonzero().flatten()
            drawn.append(places[torch.randperm(len(places), generator=generator)[:size]].sort().values)
        return cls(
            batch=batch,
            tokens=tokens,
            valid_bt1=None if valid_bt is None or all(n == tokens for n in counts) else valid_bt[..., None].to(device),
            count=sum(counts),
            pairs=sum(n * (n - 1) for n in counts),
            rank_rows=torch.stack(drawn).to(device),
            rank_batch=torch.tensor(chosen, device=device),
        )


RANK_SEQUENCES = 2
"""Sequences of a batch whose effective rank is taken."""


@without_autocast
@torch.no_grad()
def forward_sums(x_btw: Tensor, seen: Seen) -> Tensor:
    """[mean, scale, sum of squares, sum of products], the latter two of (x - mean) / scale."""
    x = x_btw.to(working_dtype(x_btw.dtype))
    if seen.valid_bt1 is None:
        mean = x.mean()
        return torch.stack([mean, *_products(x - mean)])
    kept = x.masked_fill(~seen.valid_bt1, 0.0)
    mean = kept.sum() / max(seen.count * x.shape[2], 1)
    return torch.stack([mean, *_products((kept - mean).masked_fill_(~seen.valid_bt1, 0.0))])


@without_autocast
@torch.no_grad()
def gradient_sums(g_btw: Tensor, seen: Seen) -> Tensor:
    """The same about 0: [0, scale, sum of squares, sum of products]."""
    g = g_btw.to(working_dtype(g_btw.dtype), copy=True)
    if seen.valid_bt1 is not None:
        g.masked_fill_(~seen.valid_bt1, 0.0)
    scale, squares, products = _products(g)
    return torch.stack([torch.zeros_like(scale), scale, squares, products])


def _products(y_btw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(s, sum (y/s)^2, sum over different tokens of a sequence of (y_t/s)(y_s/s)); overwrites y."""
    low, high = y_btw.aminmax()
    largest = torch.maximum(-low, high)
    y = y_btw.div_(torch.where(largest > 0, largest, 1.0))
    sums_bw = y.sum(dim=1)
    squares = y.square_().sum()
    return largest, squares, sums_bw.square().sum() - squares


def moments_of(sums: list[float], seen: Seen, width: int) -> Moments:
    """`Moments` out of the four numbers of `forward_sums`."""
    mean, scale, squares, products = sums
    return Moments(
        mean=mean,
        variance=scale * scale * squares / (seen.count * width),
        covariance=scale * scale * products / (seen.pairs * width) if seen.pairs else 0.0,
    )


def gradient_of(sums: list[float], seen: Seen, width: int) -> GradientMoments:
    """`GradientMoments` out of the four numbers of `gradient_sums`."""
    moments = moments_of(sums, seen, width)
    return GradientMoments(moments.variance, moments.covariance)


@without_autocast
@torch.no_grad()
def gram(x_btw: Tensor, seen: Seen) -> Tensor:
    """[s, r, r] float64: inner products of the sampled tokens, scaled: what `effective_ranks` needs."""
    x_srw = x_btw[seen.rank_batch[:, None], seen.rank_rows].double()
    x_srw = x_srw / x_srw.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return x_srw @ x_srw.mT


def effective_ranks(grams: Tensor) -> Tensor:
    """[...]: exp of the entropy of the singular values, normalised to sum 1, of the matrices whose Gram matrices
    [..., r, r] these are (Roy and Vetterli 2007; from memory). 0 for a matrix of zeros.

    Singular values below 1e-7 of the largest drown in rounding; they are taken as 0.
    """
    finite = torch.isfinite(grams).all(dim=-1).all(dim=-1)
    squares = torch.linalg.eigvalsh(torch.where(finite[..., None, None], grams, 0.0)).clamp_min(0.0)
    largest = squares.amax(dim=-1, keepdim=True)
    values = squares.where(squares > 1e-14 * largest, 0.0).sqrt()
    shares = values / values.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)
    entropy = -torch.special.xlogy(shares, shares).sum(dim=-1)
    ranks = torch.where(largest.squeeze(-1) > 0, entropy.exp(), 0.0)
    return torch.where(finite, ranks, float("nan"))
