"""The formulas in plain torch, as papers and notebooks write them: a whole matrix, one operation after the other.

The option is a spec. What can be made once is: the mask of hidden keys is a buffer. LASER shifts values by their
maximum over all keys, without which it overflows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from clearhead.attention.spec import AttentionSpec, Laser, SelfAdjust, Window
from clearhead.bench.prepared import Attend, Problem
from clearhead.bench.sources.sdpa import held

EPS = 1e-10


def attention(option: str, problem: Problem) -> Attend:
    """Causal, temperatures given."""
    spec, taus = AttentionSpec.parse(option), problem.temperatures(option)
    hidden = hidden_keys(spec, problem.shape.length, problem.shape.length, problem.q.device)
    tau_q, tau_v = taus.get("query"), taus.get("value")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q if tau_q is None else (q * tau_q).to(q.dtype)
        v = v if tau_v is None else (v * tau_v).to(v.dtype)
        return formula(spec, q, k, v, hidden)

    return run


def decode(option: str, problem: Problem) -> Callable[[], Tensor]:
    """One query over a buffer made once."""
    spec, taus = AttentionSpec.parse(option), problem.temperatures(option)
    keys, values = held(problem)
    last = problem.last(taus)
    query, key, value = (t[:, :, -1:] for t in (problem.q, problem.k, problem.v))
    if "value" in taus:
        values.mul_(taus["value"])
    hidden = hidden_keys(spec, 1, problem.shape.length, query.device) if isinstance(spec.pattern, Window) else None

    def run() -> Tensor:
        q, v = query, value
        if last is not None:
            q = q if last.query is None else (q * last.query).to(q.dtype)
            v = v if last.value is None else (v * last.value).to(v.dtype)
        keys[:, :, -1:] = key
        values[:, :, -1:] = v
        return formula(spec, q, keys, values, hidden)

    return run


def hidden_keys(spec: AttentionSpec, queries: int, keys: int, device: torch.device) -> Tensor:
    """[n, m] bool: later keys, and those that the window has left."""
    ago = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (ago < 0) | (ago >= spec.pattern.size) if isinstance(spec.pattern, Window) else ago < 0


def formula(spec: AttentionSpec, q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None) -> Tensor:
    """Weights and read of the spec."""
    x = q @ k.mT * q.shape[-1] ** -0.5
    s = (x if hidden is None else x.masked_fill(hidden, float("-inf"))).softmax(dim=-1)
    if isinstance(spec.weights, SelfAdjust):
        s = s * ramp(spec.weights, x, hidden)
    if isinstance(spec.read, Laser):
        shift = v.detach().amax(dim=-2, keepdim=True)
        return (s @ (v - shift).exp()).log() + shift
    return s @ v


def ramp(weights: SelfAdjust, x: Tensor, hidden: Tensor | None) -> Tensor:
    """What Self-Adjust multiplies softmax's weights by; hidden keys have weight 0 there already."""
    if weights.form == "product":
        return x
    if weights.form == "range":  # a hidden score of 0 changes neither min(l, 0) nor max(u, 0): one fill serves both
        shown_low = shown_high = x if hidden is None else x.masked_fill(hidden, 0.0)
    else:
        shown_low = x if hidden is None else x.masked_fill(hidden, float("inf"))
        shown_high = x if hidden is None else x.masked_fill(hidden, float("-inf"))
    low, high = shown_low.amin(-1, keepdim=True), shown_high.amax(-1, keepdim=True)
    if weights.detach_extrema:
        low, high = low.detach(), high.detach()
    if weights.form == "min_shift":
        return x - low
    if weights.form == "range":
        low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    return (x - low) / (high - low + EPS)
