"""What LASER's effect hangs on, measured in a model: the values' spread, the offset of the output, starved weights, and
the gradients that reach the query and key matrices.

Everything is taken on the same windows of validation text, at the start and at the end of a run, for softmax models
too: what LASER would make of their values. Legend: b batch, h heads, n queries, m keys, d head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from clearhead.attention.call import Call
from clearhead.attention.observe import watching
from clearhead.attention.reference import laser_read, log_weights, visible_scores
from clearhead.attention.terms import Rows
from clearhead.objectives.causal_lm import causal_lm_loss
from experiments.running import mean_half

STARVED, DEAD = 1e-3, 1e-7
"""The two levels of the paper's figure 1."""


def look(model: Any, tokens_bt: Tensor, targets_bt: Tensor) -> dict[str, Any]:
    """Means over layers of what each call of `attend` shows, and the norm of the gradient of all W_q and W_k."""
    calls: list[dict[str, float]] = []
    model.zero_grad(set_to_none=True)

    def watch(call: Call) -> None:
        calls.append(of_call(call))

    with watching(watch):
        nats, count = causal_lm_loss(model(tokens_bt), targets_bt)
    (nats / count).backward()
    found: dict[str, Any] = {name: sum(call[name] for call in calls) / len(calls) for name in calls[0]}
    for role in ("query", "key", "value"):
        squares = [
            float(p.grad.square().sum())
            for name, p in model.named_parameters()
            if name.endswith(f".attention.{role}.weight") and p.grad is not None
        ]
        found[f"{role}_gradient"] = sum(squares) ** 0.5
    model.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def of_call(call: Call) -> dict[str, float]:
    """`spread`: std of a channel of the values over tokens, as read (a factor of the spec included), mean over
    channels. `offset`: mean of LASER's output less the mean read's. `size`: mean size of the mean read's output."""
    n, m = call.q.shape[2], call.k.shape[2]
    rows = Rows(torch.arange(n), torch.arange(m), call.mask.resolved_offset())
    scores, visible = visible_scores(call.q, call.k, call.mask, call.bias, call.scale, rows)
    log_a = log_weights(call.spec.weights, scores, visible)
    a_bhnm = log_a.exp().masked_fill(~visible, 0.0)
    v_bhmd = call.v * getattr(call.spec.read, "by", 1.0)
    v_bhmd = v_bhmd.repeat_interleave(call.q.shape[1] // v_bhmd.shape[1], dim=1)
    mean_bhnd = a_bhnm @ v_bhmd
    laser_bhnd = laser_read(log_a, visible, v_bhmd)
    seen = a_bhnm[visible.expand_as(a_bhnm)]
    return {
        "spread": float(v_bhmd.std(dim=2).mean()),
        "offset": float((laser_bhnd - mean_bhnd).mean()),
        "size": float(mean_bhnd.abs().mean()),
        "starved": float((seen < STARVED).double().mean()),
        "dead": float((seen < DEAD).double().mean()),
        "heaviest": float(a_bhnm.amax(dim=-1).mean()),
    }


def summary(looks: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, Any]:
    """Over seeds: mean and half interval of everything, at the start and at the end."""
    found: dict[str, Any] = {}
    for when in ("start", "end"):
        rows = [one[when] for one in looks if when in one]
        if rows:
            found[when] = {name: list(mean_half([row[name] for row in rows])) for name in rows[0]}
    return found


def table(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """One row for each arm and moment."""
    columns: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("std of the values as read", lambda row: f"{row['spread'][0]:.2f}"),
        ("mean LASER - mean read", lambda row: f"{row['offset'][0]:+.3f}"),
        ("size of the mean read", lambda row: f"{row['size'][0]:.3f}"),
        ("weights below 1e-3", lambda row: f"{row['starved'][0]:.0%}"),
        ("below 1e-7", lambda row: f"{row['dead'][0]:.1%}"),
        ("largest weight of a row", lambda row: f"{row['heaviest'][0]:.2f}"),
        ("gradient of W_q, W_k", lambda row: f"{row['query_gradient'][0]:.3g}, {row['key_gradient'][0]:.3g}"),
    )
    lines = ["| arm | | " + " | ".join(name for name, _ in columns) + " |", "|---" * (2 + len(columns)) + "|"]
    for arm in arms:
        for when, row in arm["looks"].items():
            lines.append(f"| {arm['name']} | {when} | " + " | ".join(show(row) for _, show in columns) + " |")
    return lines
