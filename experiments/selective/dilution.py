"""Retrieval by one trained layer: which of n keys is meant, trained at 8 to 64 keys and asked at up to 4,096.

A source holds n tokens, a random unit key beside one of 8 values; the query is one of the keys. Keys are all different
and the right one has the largest product with the query, so a sharp enough head is right at every length.

Legend: b batch, n keys.
"""

from __future__ import annotations

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.selective.arms import ARMS, FIVE
from experiments.selective.fit import fit
from experiments.selective.layer import OneLayer
from experiments.selective.tuned import Job, Plan, Run

KEY, VALUES = 16, 8
SHORTEST, TRAINED = 8, 64
LENGTHS = (16, 64, 256, 1024, 4096)
BATCH, STEPS = 64, 400
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
VALIDATED, ASKED = 512, 256
"""Questions by which a learning rate is chosen (at the trained length), and questions at each length."""


def plan(seeds: int, *, quick: bool = False) -> Plan:
    """Five arms."""
    if quick:
        return Plan(FIVE[:3], RATES[1:2], steps=20, seeds=2)
    return Plan(FIVE, RATES, steps=STEPS, seeds=seeds)


def draw(batch: int, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Source [b, n, 24], query [b, 1, 24], the value asked for [b] and where it stands [b]."""
    key_bnk = F.normalize(torch.randn(batch, n, KEY, generator=generator), dim=-1)
    value_bn = torch.randint(VALUES, (batch, n), generator=generator)
    place_b = torch.randint(n, (batch,), generator=generator)
    rows = torch.arange(batch)
    source = torch.cat((key_bnk, F.one_hot(value_bn, VALUES).float()), dim=-1)
    query = torch.cat((key_bnk[rows, place_b], torch.zeros(batch, VALUES)), dim=-1)[:, None]
    return source, query, value_bn[rows, place_b], place_b


def solve(source_bnw: Tensor, query_b1w: Tensor) -> Tensor:
    """The value [b] of the key with the largest product: what a perfect reader says."""
    place_b = (source_bnw[..., :KEY] @ query_b1w[..., :KEY].transpose(1, 2))[..., 0].argmax(dim=1)
    return source_bnw[torch.arange(len(place_b)), place_b, KEY:].argmax(dim=-1)


def logits(model_output_bw: Tensor) -> Tensor:
    """The values' part of what the layer writes."""
    return model_output_bw[:, KEY:]


def score(model: OneLayer, n: int, questions: int, seed: int) -> dict[str, float]:
    """Fresh questions at one length: right answers, loss, and how attention lies."""
    generator = torch.Generator().manual_seed(seed)
    right, lost, ln_target, entropy, target = 0, 0.0, 0.0, 0.0, 0.0
    for _ in range(questions // BATCH):
        source, query, value, place = draw(BATCH, n, generator)
        out, seen = model.looked(source, query)
        weight_b = seen["weights"][torch.arange(BATCH), place]
        right += int((logits(out).argmax(-1) == value).sum())
        lost += float(F.cross_entropy(logits(out), value))
        ln_target += float(weight_b.clamp_min(1e-30).log().mean())
        target += float(weight_b.mean())
        entropy += float(seen["entropy"].mean())
    parts = questions // BATCH
    return {
        "accuracy": right / questions,
        "loss": lost / parts,
        "target": target / parts,
        "ln_target": ln_target / parts,
        "entropy": entropy / parts,
    }


def train(job: Job) -> Run:
    """One run."""
    torch.set_num_threads(1)
    began = time.process_time()
    model = OneLayer(KEY + VALUES, KEY, dict(ARMS[job.arm]), job.seed)
    generator = torch.Generator().manual_seed(job.seed)
    stretch = math.log(TRAINED / SHORTEST)

    def loss_of_step(step: int) -> Tensor:
        n = round(SHORTEST * math.exp(stretch * float(torch.rand((), generator=generator))))
        source, query, value, _ = draw(BATCH, n, generator)
        return F.cross_entropy(logits(model(source, query)), value)

    if not fit(model, loss_of_step, rate=job.rate, steps=job.steps):
        return job.record("diverged", val=None)
    val = score(model, TRAINED, VALIDATED, 10_000 + job.seed)["loss"]
    lengths = {str(n): score(model, n, ASKED, 20_000 + job.seed) for n in LENGTHS} if job.seed < 1000 else {}
    return job.record(
        "finished",
        val=val,
        lengths=lengths,
        norm=model.norm(),
        slopes=model.slopes(),
        cpu_seconds=round(time.process_time() - began, 2),
    )
