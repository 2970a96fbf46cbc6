"""Importance-weighted likelihood of later segments: raise the model's probability of what the critic likes.

Reward-augmented maximum likelihood (Norouzi et al., arXiv 1609.00150) with real segments in the place of samples:

    log w_i = (T(x_i, later_i) - T(x_i, next_i)) / temperature - log q_i,   then normalised over the pairs of a step
    L_RAML  = sum_i w_i * nll_i,        nll_i = mean over tokens of later_i of -log p(token | x_i, tokens before)

No gradient passes the weights, so the critic learns nothing from it. Taking T(x, next) off makes the weights those of a
gain over the truth; it differs between the x of a batch, so it changes the weights (as in the released code).

Where we differ from that code: the first token of `later` is predicted like the others, padding counts nowhere, q is
the probability of the draw (see segments.py), and nll is a mean over the segment's own tokens instead of its sum over
all tokens of the batch: for b pairs of about one length, our weight of the term is theirs divided by b.

Legend: b pairs, t tokens, V vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.errors import UserError
from clearhead.models.encoder import Encoder
from clearhead.models.seq2seq import Seq2Seq

LEAST_EFFECTIVE = 2.0
"""Below this effective sample size a step learns from about one pair."""
NO_LIKELIHOOD = (
    "an encoder sees a segment from both sides and predicts hidden tokens, so it has no probability p(later | x) that "
    "could be raised; it takes objective.nsp alone"
)


def log_importance_weights(
    score_b: Tensor, log_q_b: Tensor, *, temperature: float = 1.0, baseline_b: Tensor | None = None
) -> Tensor:
    """Return log w, normalised to sum w = 1 over the pairs, without gradient, [b] float64.

    Args:
        score_b: T(x, later).
        log_q_b: log probability with which each `later` was drawn.
        temperature: above 0; large makes the scores equal, and w ~ 1 / q.
        baseline_b: T(x, next), taken off the score; None = nothing is.
    """
    if not temperature > 0.0:
        raise ValueError(f"log_importance_weights: expected a temperature above 0, got {temperature}")
    gain_b = score_b.detach().double()
    if baseline_b is not None:
        gain_b = gain_b - baseline_b.detach().double()
    return (gain_b / temperature - log_q_b.detach().double().to(gain_b.device)).log_softmax(dim=0)


def effective_sample_size(log_w_b: Tensor) -> Tensor:
    """Return 1 / sum w^2 of normalised log weights, a scalar between 1 and the number of pairs."""
    return torch.exp(-torch.logsumexp(2.0 * log_w_b, dim=0))


def conditional_nats(
    model: nn.Module,
    first_bt: Tensor,
    first_lengths_b: Tensor,
    later_bt: Tensor,
    later_lengths_b: Tensor,
    *,
    begin: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (sum of -log p(token | x, tokens before) over the tokens of `later`, their number), [b] each.

    A causal decoder reads `x later` in one pass, without a gap and filled on the right; each token of `later` is
    predicted, the first one from the end of x, and none of x. A `Seq2Seq` reads x as its source; its decoder needs a
    token to `begin` with. Nothing that stands behind a length is read.

    Raises `UserError` for an encoder, with the reason.
    """
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, Encoder):
        raise UserError(NO_LIKELIHOOD)
    if isinstance(model, Seq2Seq):
        if begin is None:
            raise ValueError("conditional_nats: a Seq2Seq needs the token that its decoder begins with (begin=...)")
        source_valid = _before(first_lengths_b, first_bt.shape[1])
        read_bt = torch.cat([torch.full_like(later_bt[:, :1], begin), later_bt[:, :-1]], dim=1)
        targets_bt = later_bt.masked_fill(~_before(later_lengths_b, later_bt.shape[1]), -100)
        logits_btV = model(first_bt.masked_fill(~source_valid, 0), read_bt, source_valid=source_valid)
    else:
        tokens_bt, targets_bt, valid_bt = joined(first_bt, first_lengths_b, later_bt, later_lengths_b)
        logits_btV = model(tokens_bt, valid=None if bool(valid_bt.all()) else valid_bt)
    nats_bt = F.cross_entropy(logits_btV.flatten(0, 1).float(), targets_bt.flatten(), reduction="none")
    return nats_bt.view_as(targets_bt).sum(dim=1), later_lengths_b


def joined(
    first_bt: Tensor, first_lengths_b: Tensor, later_bt: Tensor, later_lengths_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens, targets, valid) of `x later` without a gap, [b, t] each, filled on the right.

    The last token of `later` is not read, since nothing is predicted from it. -100 = no target.
    """
    total_b = first_lengths_b + later_lengths_b
    place_1t = torch.arange(int(total_b.max()), device=first_bt.device)[None]
    within_bt = place_1t < first_lengths_b[:, None]
    from_first = first_bt.gather(1, place_1t.clamp(max=first_bt.shape[1] - 1).expand(len(first_bt), -1))
    from_later = later_bt.gather(1, (place_1t - first_lengths_b[:, None]).clamp(0, later_bt.shape[1] - 1))
    whole_bt = torch.where(within_bt, from_first, from_later).masked_fill(place_1t >= total_b[:, None], 0)
    counted_bt = (place_1t >= first_lengths_b[:, None]) & (place_1t < total_b[:, None])
    targets_bt = whole_bt.masked_fill(~counted_bt, -100)[:, 1:]
    valid_bt = (place_1t < total_b[:, None] - 1)[:, :-1]
    return whole_bt[:, :-1].masked_fill(~valid_bt, 0), targets_bt, valid_bt


def _before(lengths_b: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens, device=lengths_b.device)[None] < lengths_b[:, None]
