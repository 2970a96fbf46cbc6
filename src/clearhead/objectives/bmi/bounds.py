"""Estimates of mutual information from a critic's scores: pure functions, and what each of them may claim.

Scores of pairs (x, y) drawn together (P) and drawn apart (Q = Px Py), in nats. *In expectation* is over the pairs that
are scored, for a critic that was made without them: score other pairs than it was trained on.

| function | value | is it a bound on I? |
|---|---|---|
| `donsker_varadhan` | E_P[T] - log E_Q[e^T] | of the whole population yes, from below, tight at T = PMI + const. Of a sample no: the log of a mean lies low, so the value lies high |
| `nwj` | E_P[T] - E_Q[e^(T - 1)] | from below, in expectation, also of a sample; tight at T = PMI + 1 |
| `mean_score` | E_P[T] | no. It equals I at T = PMI, which is where next-segment prediction leads |
| `jensen_shannon` | E_P[-softplus(-T)] - E_Q[softplus(T)] | no: at most 2 JS(P, Q) - 2 log 2, another divergence |
| `info_nce` | log K + E[log softmax over K of T] | from below, in expectation, and never above log K |

Donsker and Varadhan 1983 as used by Belghazi et al. (arXiv 1801.04062); Nguyen, Wainwright and Jordan (arXiv
0809.0853); Nowozin et al. (arXiv 1606.00709); van den Oord et al. (arXiv 1807.03748). Legend: n, m pairs; k choices.
"""  # noqa: E501

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def donsker_varadhan(
    joint_n: Tensor, apart_m: Tensor, *, joint_weights: Tensor | None = None, apart_weights: Tensor | None = None
) -> Tensor:
    """Return E_P[T] - log E_Q[e^T], a scalar; weights (which sum to 1) make the means exact ones of a table."""
    return _mean(joint_n, joint_weights) - _log_mean_exp(apart_m, apart_weights)


def nwj(
    joint_n: Tensor, apart_m: Tensor, *, joint_weights: Tensor | None = None, apart_weights: Tensor | None = None
) -> Tensor:
    """Return E_P[T] - E_Q[e^(T - 1)], a scalar. A critic of next-segment prediction aims at PMI: give it T + 1."""
    return _mean(joint_n, joint_weights) - _log_mean_exp(apart_m - 1.0, apart_weights).exp()


def mean_score(joint_n: Tensor, *, joint_weights: Tensor | None = None) -> Tensor:
    """Return E_P[T]: an estimate of I as good as T is one of the PMI, and no bound."""
    return _mean(joint_n, joint_weights)


def jensen_shannon(
    joint_n: Tensor, apart_m: Tensor, *, joint_weights: Tensor | None = None, apart_weights: Tensor | None = None
) -> Tensor:
    """Return E_P[-softplus(-T)] - E_Q[softplus(T)]: minus the loss of next-segment prediction."""
    return _mean(-F.softplus(-joint_n), joint_weights) - _mean(F.softplus(apart_m), apart_weights)


def info_nce(score_nk: Tensor) -> Tensor:
    """Return log K + mean over rows of log softmax at the first column, a scalar; at most log K.

    score_nk: T of each x with K choices of y; the first is its own.
    """
    if score_nk.dim() != 2 or score_nk.shape[1] < 2:
        raise ValueError(f"info_nce: expected scores [rows, choices] with two choices or more, got {score_nk.shape}")
    return math.log(score_nk.shape[1]) + score_nk.log_softmax(dim=1)[:, 0].mean()


def _mean(values: Tensor, weights: Tensor | None) -> Tensor:
    return values.mean() if weights is None else (values * weights).sum()


def _log_mean_exp(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return torch.logsumexp(values.flatten(), dim=0) - math.log(values.numel())
    # A weight of 0 is a pair that does not occur.
    return torch.logsumexp((values + weights.log()).flatten(), dim=0)
