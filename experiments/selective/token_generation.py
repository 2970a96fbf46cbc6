"""Token generation on a graph of 8 tokens in d <= 3 dimensions: who can say a token's neighbours, and at what norm?

One head attends from each token to all 8, and its attention map is the prediction: row i should be uniform over the
neighbours of i. Tokens e are unit vectors in d dimensions, W is d x d and learned:

    P_hat = softmax over j of  tau_i  e_i^T W e_j          loss = the cross-entropy to P, exact, no sampling

With few dimensions the scores have a small rank, so W must serve tokens with 1, 2 and 4 neighbours at once. The excess
is the cross-entropy less the entropy of P, so 0 is perfect. Tokens are *fixed*, drawn anew for each seed (without
temperatures the loss is then convex in W, so runs differ by what an arm can say and not by where it got stuck), or
*learned* together with W, where they do get stuck.

Temperatures: none; one learned scalar (the control: it scales W and nothing else); one for each number of neighbours
(what the paper's toy compares); one for each token, computed from it as in the package, 1 + tanh(vector . GELU(W e_i)).
All are trained at the rate of W: at the package's tenfold rate a free scalar changed its sign here and back.

Legend: i, j tokens, d dimensions.
"""

from __future__ import annotations

import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.layers.temperature import TokenPart
from experiments.selective.fit import fit
from experiments.selective.tuned import Job, Plan, Run

EDGES = ((0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (4, 5), (5, 6), (6, 7))
"""The paper gives no edges; these leave tokens with 1, 2 and 4 neighbours."""
TOKENS = 8
SETTINGS = ("2, fixed", "3, fixed", "2, learned", "3, learned")
"""Dimensions, and whether the tokens are learned."""
ARMS = ("softmax", "learned scalar", "one per number of neighbours", "selective, token part")
GROUPED, TOKEN = ARMS[2], ARMS[3]
STEPS = 600
RATES = (3e-2, 1e-1, 3e-1)
SEEDS_TIMES = 2
"""Runs are short and end in different minima, so this part takes so many times the seeds of the others."""


def plan(seeds: int, *, quick: bool = False) -> Plan:
    """Four arms."""
    if quick:
        return Plan(ARMS, RATES[1:2], steps=20, seeds=2, settings=SETTINGS[:1])
    return Plan(ARMS, RATES, steps=STEPS, seeds=SEEDS_TIMES * seeds, settings=SETTINGS)


def adjacency() -> Tensor:
    """[i, j] 0 or 1."""
    there = torch.zeros(TOKENS, TOKENS)
    for i, j in EDGES:
        there[i, j] = there[j, i] = 1.0
    return there


def wanted() -> Tensor:
    """P, [i, j]: uniform over the neighbours."""
    return adjacency() / adjacency().sum(dim=1, keepdim=True)


def neighbours() -> list[int]:
    """Of each token, how many."""
    return [int(n) for n in adjacency().sum(dim=1)]


class Grouped(nn.Module):
    """One temperature for each number of neighbours, from 1."""

    group_i: Tensor

    def __init__(self) -> None:
        super().__init__()
        numbers = sorted(set(neighbours()))
        self.register_buffer("group_i", torch.tensor([numbers.index(n) for n in neighbours()]))
        self.tau_g = nn.Parameter(torch.ones(len(numbers)))

    def forward(self, projection_id: Tensor) -> Tensor:
        """[i, 1]."""
        return self.tau_g[self.group_i, None]


class Single(nn.Module):
    """One temperature, from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.tau_1 = nn.Parameter(torch.ones(1))

    def forward(self, projection_id: Tensor) -> Tensor:
        """[1, 1]."""
        return self.tau_1[:, None]


class FromToken(nn.Module):
    """1 + the package's token part, which starts at 0."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.part = TokenPart(1, dimensions, "shared")

    def forward(self, projection_id: Tensor) -> Tensor:
        """[i, 1]."""
        return 1.0 + self.part(projection_id[None])[0].T


class Map(nn.Module):
    """The attention map."""

    def __init__(self, arm: str, setting: str, seed: int) -> None:
        super().__init__()
        dimensions, tokens = setting.split(", ")
        generator, size = torch.Generator().manual_seed(seed), int(dimensions)
        self.tokens = nn.Parameter(torch.randn(TOKENS, size, generator=generator), requires_grad=tokens == "learned")
        self.weight = nn.Parameter(torch.randn(size, size, generator=generator))
        makers = {GROUPED: Grouped, TOKEN: lambda: FromToken(size), "learned scalar": Single}
        self.temperature = makers[arm]() if arm in makers else None

    def temperatures(self) -> Tensor:
        """Of each token, [i, 1]."""
        if self.temperature is None:
            return torch.ones(TOKENS, 1)
        projection_id = F.normalize(self.tokens, dim=-1) @ self.weight
        return self.temperature(projection_id).expand(TOKENS, 1)

    def forward(self) -> Tensor:
        """ln P_hat, [i, j]."""
        e_id = F.normalize(self.tokens, dim=-1)
        scores_ij = (e_id @ self.weight) @ e_id.T
        return (self.temperatures() * scores_ij).log_softmax(dim=-1)


def cross_entropy(ln_said_ij: Tensor, wanted_ij: Tensor) -> Tensor:
    """Mean over rows."""
    return -(wanted_ij * ln_said_ij).sum(dim=-1).mean()


def entropy(wanted_ij: Tensor) -> float:
    """The least that `cross_entropy` can be."""
    return float(-torch.xlogy(wanted_ij, wanted_ij).sum(dim=-1).mean())


def measure(ln_said_ij: Tensor, wanted_ij: Tensor) -> dict[str, float]:
    """Excess cross-entropy in nats, and the l1 distance of rows, mean over rows."""
    return {
        "excess": float(cross_entropy(ln_said_ij, wanted_ij)) - entropy(wanted_ij),
        "l1": float((ln_said_ij.exp() - wanted_ij).abs().sum(dim=-1).mean()),
    }


def solution(score: float = 30.0) -> Tensor:
    """ln P_hat of scores that the graph itself gives, in as many dimensions as there are tokens."""
    return (score * adjacency()).log_softmax(dim=-1)


def train(job: Job) -> Run:
    """One run."""
    torch.set_num_threads(1)
    began = time.process_time()
    model = Map(job.arm, job.setting, job.seed)
    target = wanted()
    if not fit(model, lambda step: cross_entropy(model(), target), rate=job.rate, steps=job.steps):
        return job.record("diverged", val=None)
    with torch.no_grad():
        found = measure(model(), target)
        taus = [float(tau) for tau in model.temperatures()[:, 0]]
        norm = float(torch.linalg.matrix_norm(model.weight, ord=2))
    by_number = {
        str(n): sum(tau for tau, own in zip(taus, neighbours(), strict=True) if own == n) / neighbours().count(n)
        for n in sorted(set(neighbours()))
    }
    return job.record(
        "finished",
        val=found["excess"],
        **found,
        norm=norm,
        temperatures=by_number,
        cpu_seconds=round(time.process_time() - began, 2),
    )
