"""How much the output moves when all weights move a little, at 6 to 200 residual branches.

    change = E ||F(x, W) - F(x, W + noise)||^2, the sum over features, mean over tokens; F ends in a norm

Two sizes of noise: 0.01 N(0, 1), and +-1e-4 by a random sign. Changes of the second are scaled to the first's variance,
so that both read as the same quantity and differ only where the first is too large to be small.

What is predicted, without a free constant, is Admin's sum with the constants in it (derived by us):

    change = d sum_i beta_ii^2 c_i,   c_i = noise variance * sum over the branch's two matrices of 1 / var W

c_i is the relative change of a branch whose matrices get noise (value and output; up and down). It holds while a branch
passes on the relative change of its input as it is; scores are left out. Embedding tables get no noise: theirs would
add the same d * 1e-4 / var (0.4) at every depth.

Legend: b batch, t tokens, w width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clearhead.init.admin import needs_profile, profile_omega
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.signal.describe import describe
from clearhead.signal.measurement import measure
from clearhead.signal.prediction import predict_skeleton
from clearhead.signal.skeleton import AttentionShape, Matrix, Skeleton
from clearhead.signal.trace import Trace

SCHEMES: dict[str, dict[str, Any]] = {
    "Post-LN": {"norm_placement": "post", "init": "admin_constant", "output_change": "linear"},
    "Pre-LN": {"norm_placement": "pre", "init": "xavier", "embedding_norm": True},
    "Admin, profiled": {"norm_placement": "post", "init": "admin"},
    "constant omega, O(log n)": {"norm_placement": "post", "init": "admin_constant", "output_change": "log"},
    "constant omega, O(1)": {"norm_placement": "post", "init": "admin_constant", "output_change": "constant"},
}
SUBLAYERS = (6, 12, 24, 50, 100, 200)
QUICK_SUBLAYERS = (6, 12)
WIDTH, HEADS, TOKENS, ROWS, VOCABULARY = 64, 4, 32, 4, 1000
DRAWS = 3
"""Of the noise, per model."""
NOISE = 0.01
SIGN = 1e-4


@dataclass(frozen=True)
class Job:
    """One model."""

    scheme: str
    sublayers: int
    seed: int


def build(job: Job) -> torch.nn.Module:
    """An encoder in float64: ReLU, feed-forward 4d, LayerNorm (on the embedding too), learned positions, no dropout.

    Every scheme starts from the same weights: Xavier with query, key and value as one matrix. Pre-LN's are drawn as
    three, of twice the variance, and brought down.
    """
    config = ModelConfig(
        architecture="encoder",
        vocab_size=VOCABULARY,
        context=TOKENS,
        layers=job.sublayers // 2,
        width=WIDTH,
        heads=HEADS,
        feed_forward="relu",
        norm="layer",
        position="learned",
        **SCHEMES[job.scheme],
    )
    model = build_model(config, job.seed).double().train()
    if config.init == "xavier":
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("query.weight", "key.weight", "value.weight")):
                    parameter.mul_(0.5**0.5)
    if needs_profile(model):
        profile_omega(model, tokens_of(job), seed=job.seed)
    return model


def tokens_of(job: Job) -> Tensor:
    """[b, t], every token of the vocabulary equally likely."""
    generator = torch.Generator().manual_seed(job.seed)
    return torch.randint(0, VOCABULARY, (ROWS, TOKENS), generator=generator)


@torch.no_grad()
def change(model: Any, tokens_bt: Tensor, draw: Callable[[Tensor], Tensor]) -> float:
    """E ||difference||^2 of the last state when `draw(weight)` is added to every matrix of the branches."""
    before_btw = model.hidden(tokens_bt)
    held = [(matrix, matrix.clone()) for matrix in model.blocks.parameters() if matrix.dim() > 1]
    for matrix, _ in held:
        matrix.add_(draw(matrix))
    after_btw = model.hidden(tokens_bt)
    for matrix, value in held:
        matrix.copy_(value)
    return float((after_btw - before_btw).square().sum(-1).mean())


def measure_one(job: Job) -> dict[str, Any]:
    """Both changes, the sum of beta_ii^2 measured and predicted, and the predicted change."""
    torch.set_num_threads(1)
    model, tokens_bt = build(job), tokens_of(job)
    generator = torch.Generator().manual_seed(10_000 + job.seed)

    def normal(weight: Tensor) -> Tensor:
        return NOISE * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)

    def sign(weight: Tensor) -> Tensor:
        return SIGN * (2 * torch.randint(0, 2, weight.shape, generator=generator).to(weight.dtype) - 1)

    changes = [change(model, tokens_bt, normal) for _ in range(DRAWS)]
    small = [change(model, tokens_bt, sign) * (NOISE / SIGN) ** 2 for _ in range(DRAWS)]
    skeleton = describe(model, tokens=TOKENS, repetition=1.0 / VOCABULARY)
    predicted = predict_skeleton(skeleton)
    found = measure(model, tokens_bt, backward=False, taps=("input", "branch", "sum", "output"))
    return {
        "scheme": job.scheme,
        "sublayers": job.sublayers,
        "seed": job.seed,
        "change": sum(changes) / DRAWS,
        "small": sum(small) / DRAWS,
        "shares": sum(measured_shares(found)),
        "shares_predicted": sum(tap.share or 0.0 for tap in predicted.at("branch")),
        "change_predicted": predicted_change(predicted, skeleton, NOISE**2),
    }


def predicted_change(trace: Trace, skeleton: Skeleton, variance: float) -> float:
    """See the module's formula."""
    stack = skeleton.stacks[0]
    total = 0.0
    shares = [tap.share or 0.0 for tap in trace.at("branch")]
    branches = [sub.branch for layer in stack.layers for sub in layer]
    for share, branch in zip(shares, branches, strict=True):
        row: tuple[Matrix, ...]
        row = (branch.value, branch.output) if isinstance(branch, AttentionShape) else (branch.up, branch.down)
        total += share * variance * sum(1.0 / matrix.variance for matrix in row)
    return skeleton.width * total


def measured_shares(trace: Trace) -> list[float]:
    """beta_ii^2 = variance of the branch over that of the sum, which needs no dropout and branches of scale 1."""
    sums = trace.at("sum") or trace.stream("encoder")[1:]
    pairs = [(branch.forward, total.forward) for branch, total in zip(trace.at("branch"), sums, strict=True)]
    return [branch.variance / total.variance for branch, total in pairs if branch is not None and total is not None]
