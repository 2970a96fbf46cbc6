"""Denoising: which of 32 tokens are signal, and what is the signal without its noise?

A sequence has one direction e_k out of 8 in 8 dimensions. Every token is signal with probability a quarter, x = e_k +
noise, and the last one always; the others are noise alone, from N(0, sigma^2). Wanted at the last token: e_k. The loss
is the squared error, summed over the 8 dimensions.

Estimators without training stand beside the trained ones:

- all tokens: the best multiple of their mean. Attention that cannot tell tokens apart can do no better.
- selected tokens: the mean of those whose largest component is at least 1/2. A value temperature that suppresses the
  others under flat attention would be this one.
- true signals: the mean of the tokens that are signal, which nobody is told.
- posterior: the mean of e_k given all tokens, by Bayes's rule, which no estimator beats on average.

Legend: b batch, l tokens, d dimensions and directions.
"""

from __future__ import annotations

import math
import time

import torch
from scipy import stats
from torch import Tensor

from experiments.selective.arms import ARMS, FIVE, QUERY_ONLY, VALUE_ONLY
from experiments.selective.fit import fit
from experiments.selective.layer import OneLayer
from experiments.selective.tuned import Job, Plan, Run

D, L, SIGNAL = 8, 32, 0.25
LONGER = 128
NOISES = ("0.1", "0.2", "0.3")
TUNED_AT = "0.2"
BATCH, STEPS = 64, 600
RATES = (3e-3, 1e-2, 3e-2)
SCORED = 4096
"""Sequences of a score."""
WITHOUT = ("all tokens", "selected tokens", "true signals", "posterior")
"""Estimators that nothing trains."""


def plan(seeds: int, *, quick: bool = False) -> Plan:
    """Seven arms at three strengths of noise; the rate is chosen at the middle one."""
    if quick:
        return Plan((*FIVE[:3], VALUE_ONLY), RATES[1:2], steps=20, seeds=2, settings=NOISES[1:2])
    return Plan((*FIVE, QUERY_ONLY, VALUE_ONLY), RATES, steps=STEPS, seeds=seeds, settings=NOISES, tuned_at=TUNED_AT)


def draw(batch: int, length: int, sigma: float, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [b, l, d], the wanted [b, d], and which tokens are signal [b, l]."""
    wanted_bd = torch.eye(D)[torch.randint(D, (batch,), generator=generator)]
    signal_bl = torch.rand(batch, length, generator=generator) < SIGNAL
    signal_bl[:, -1] = True
    noise_bld = sigma * torch.randn(batch, length, D, generator=generator)
    return signal_bl[..., None] * wanted_bd[:, None] + noise_bld, wanted_bd, signal_bl


def all_tokens(x_bld: Tensor, sigma: float) -> Tensor:
    """The mean of all, times the multiple that has the least squared error."""
    length = x_bld.shape[1]
    share, square = _share(length)
    return x_bld.mean(dim=1) * share / (square + D * sigma**2 / length)


def all_tokens_error(length: int, sigma: float) -> float:
    """What `all_tokens` costs, in closed form."""
    share, square = _share(length)
    return 1.0 - share**2 / (square + D * sigma**2 / length)


def _share(length: int) -> tuple[float, float]:
    """Mean and mean square of the share of signals."""
    mean = (1 + SIGNAL * (length - 1)) / length
    return mean, mean**2 + SIGNAL * (1 - SIGNAL) * (length - 1) / length**2


def selected_tokens(x_bld: Tensor, sigma: float) -> Tensor:
    """The mean of tokens with a component of at least 1/2; the last one where there is none."""
    chosen_bl = x_bld.amax(dim=-1) >= 0.5
    chosen_bl[:, -1] |= ~chosen_bl.any(dim=1)
    return _mean(x_bld, chosen_bl)


def true_signals(x_bld: Tensor, signal_bl: Tensor) -> Tensor:
    """The mean of the tokens that are signal."""
    return _mean(x_bld, signal_bl)


def true_signals_error(length: int, sigma: float) -> float:
    """What `true_signals` costs: d sigma^2 E[1 / N], N - 1 being binomial."""
    others = range(length)
    chances = stats.binom.pmf(others, length - 1, SIGNAL)
    return D * sigma**2 * sum(float(p) / (1 + k) for k, p in zip(others, chances, strict=True))


def posterior(x_bld: Tensor, sigma: float) -> Tensor:
    """The mean of e_k given all tokens."""
    # ln of the density of x under e_k, less that under noise: (2 x_k - 1) / (2 sigma^2)
    ratio_bld = (2 * x_bld - 1) / (2 * sigma**2)
    mixed_bld = torch.logaddexp(ratio_bld[:, :-1] + math.log(SIGNAL), torch.tensor(math.log(1 - SIGNAL)))
    return (mixed_bld.sum(dim=1) + ratio_bld[:, -1]).softmax(dim=-1)


def _mean(x_bld: Tensor, chosen_bl: Tensor) -> Tensor:
    return (x_bld * chosen_bl[..., None]).sum(dim=1) / chosen_bl.sum(dim=1, keepdim=True)


def error(said_bd: Tensor, wanted_bd: Tensor) -> float:
    """Squared error, summed over dimensions, mean over sequences."""
    return float((said_bd - wanted_bd).square().sum(dim=-1).mean())


def untrained(sigma: float, length: int = L, seed: int = 0) -> dict[str, float]:
    """The four estimators without training, measured on fresh sequences; and the closed forms."""
    x, wanted, signal = draw(4 * SCORED, length, sigma, torch.Generator().manual_seed(seed))
    said = {
        "all tokens": all_tokens(x, sigma),
        "selected tokens": selected_tokens(x, sigma),
        "true signals": true_signals(x, signal),
        "posterior": posterior(x, sigma),
    }
    closed = {"all tokens": all_tokens_error(length, sigma), "true signals": true_signals_error(length, sigma)}
    return {name: error(one, wanted) for name, one in said.items()} | {f"{k}, formula": v for k, v in closed.items()}


def score(model: OneLayer, length: int, sigma: float, seed: int) -> dict[str, float]:
    """Squared error on fresh sequences, and how much of the attention lies on signals."""
    x, wanted, signal = draw(SCORED, length, sigma, torch.Generator().manual_seed(seed))
    out, seen = model.looked(x, x[:, -1:])
    return {"error": error(out, wanted), "on_signals": float((seen["weights"] * signal).sum(dim=-1).mean())}


def train(job: Job) -> Run:
    """One run; `setting` is sigma."""
    torch.set_num_threads(1)
    began = time.process_time()
    sigma = float(job.setting)
    model = OneLayer(D, D, dict(ARMS[job.arm]), job.seed)
    generator = torch.Generator().manual_seed(job.seed)

    def loss_of_step(step: int) -> Tensor:
        x, wanted, _ = draw(BATCH, L, sigma, generator)
        return (model(x, x[:, -1:]) - wanted).square().sum(dim=-1).mean()

    if not fit(model, loss_of_step, rate=job.rate, steps=job.steps):
        return job.record("diverged", val=None)
    found = {"val": score(model, L, sigma, 10_000 + job.seed)["error"]}
    if job.seed < 1000:
        found |= score(model, L, sigma, 20_000 + job.seed)
        found["error_longer"] = score(model, LONGER, sigma, 30_000 + job.seed)["error"]
    return job.record("finished", **found, norm=model.norm(), cpu_seconds=round(time.process_time() - began, 2))
