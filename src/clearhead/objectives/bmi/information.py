"""How much neighbouring segments tell about each other, by a model's states: a fresh critic on frozen vectors.

The critic that was trained beside a model is optimistic: the model moved to please it, on pairs it was trained on. Here
another one, drawn anew, learns on one half of held-out pairs and is scored on the other; nothing reaches the model.
Held-out likelihood, accuracy of next-segment prediction and this estimate are three quantities; none replaces another.

The halves are whole documents where both can have a third of the pairs, else the first and the second part of each
document. A part of the learning half (again its last documents, or parts) decides when to stop.
Legend: n pairs, f size of a vector, k choices.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn as nn
from torch import Tensor

from clearhead.errors import UserError
from clearhead.objectives.bmi import bounds
from clearhead.objectives.bmi.critic import ADAM_BETAS, Critic
from clearhead.objectives.bmi.nsp import nsp_accuracy, nsp_loss
from clearhead.objectives.bmi.segments import Ints, Segments
from clearhead.objectives.bmi.states import segment_vectors
from clearhead.objectives.bmi.terms import stacked

CHOICES = 64
LEAST_PAIRS = 16
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Information:
    """Estimates in nats on the scored half; see `clearhead.objectives.bmi.bounds` for what is a bound."""

    pairs: int
    """Pairs that were scored."""
    learned_from: int
    """Pairs that the critic learned from."""
    split_by: str
    """documents | position."""
    choices: int
    """k of info_nce, and the pairs apart (k - 1 for each pair) that stand for independence."""
    accuracy: float
    """Of next-segment prediction by the fresh critic."""
    mean_score: float
    donsker_varadhan: float
    nwj: float
    jensen_shannon: float
    info_nce: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class FrozenPairs:
    """Vectors of segments and of the next ones, [n, f], and where they stand, [n] each, in reading order."""

    first: Tensor
    next: Tensor
    number: Ints
    """Number of the first segment; the next one's is one higher."""
    document: Ints

    def take(self, chosen_n: Bools) -> FrozenPairs:
        """Some of them."""
        rows = torch.from_numpy(np.flatnonzero(chosen_n)).to(self.first.device)
        return FrozenPairs(self.first[rows], self.next[rows], self.number[chosen_n], self.document[chosen_n])

    def __len__(self) -> int:
        return len(self.number)


@torch.no_grad()
def freeze(
    model: nn.Module, segments: Segments, *, layers: Sequence[int], most: int = 2048, batch_size: int = 64
) -> FrozenPairs:
    """Read pairs of neighbours with `model` in eval mode: all, or `most` of them, evenly spread."""
    leading = segments.leading
    if len(leading) > most:
        leading = leading[np.linspace(0, len(leading) - 1, most).round().astype(np.int64)]
    needed = np.unique(np.concatenate([leading, leading + 1]))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        parts = []
        for begin in range(0, len(needed), batch_size):
            tokens, valid = stacked([segments.read(needed[begin : begin + batch_size])], device)
            parts.append(segment_vectors(model, tokens, valid, layers=layers).float())
    finally:
        model.train(was_training)
    vectors_nf = torch.cat(parts)
    own, following = (torch.from_numpy(np.searchsorted(needed, index)).to(device) for index in (leading, leading + 1))
    return FrozenPairs(vectors_nf[own], vectors_nf[following], leading, segments.document[leading])


def estimate_information(
    pairs: FrozenPairs,
    *,
    seed: int = 0,
    hidden: int = 64,
    steps: int = 600,
    batch_size: int = 256,
    lr: float = 1e-3,
    choices: int = CHOICES,
) -> Information:
    """Train a fresh critic on one half of `pairs` and return the estimates on the other. No global generator is used.

    The vectors are brought to mean 0 and variance 1 by the learning half; the critic is `Critic` without dropout,
    trained by Adam and next-segment prediction, and stopped where a held-back fifth of the learning half was told apart
    best.

    Raises `UserError` for too few pairs.
    """
    learning_n, scored_n, split_by = halves(pairs)
    if min(learning_n.sum(), scored_n.sum()) < LEAST_PAIRS:
        raise UserError(
            f"information: at least {LEAST_PAIRS} pairs of segments are needed in each half, got "
            f"{int(learning_n.sum())} and {int(scored_n.sum())}; give more text or cut shorter segments"
        )
    learn, score = pairs.take(learning_n), pairs.take(scored_n)
    mean_f, std_f = learn.first.mean(dim=0), learn.first.std(dim=0).clamp_min(1e-6)
    learn, score = (
        dataclasses.replace(part, first=(part.first - mean_f) / std_f, next=(part.next - mean_f) / std_f)
        for part in (learn, score)
    )
    random = np.random.default_rng([seed, 0x1F0])
    cut = int(0.8 * len(learn))
    kept = np.arange(len(learn)) < cut
    critic = _fit(learn.take(kept), learn.take(~kept), random, seed, hidden, steps, batch_size, lr)
    choices = min(choices, len(score) - 1)
    with torch.no_grad():
        score_nk = choice_scores(critic, score, choices, random)
    joint_n, apart = score_nk[:, 0].double(), score_nk[:, 1:].double()
    return Information(
        pairs=len(score),
        learned_from=len(learn),
        split_by=split_by,
        choices=choices,
        accuracy=float(nsp_accuracy(joint_n, apart)),
        mean_score=float(bounds.mean_score(joint_n)),
        donsker_varadhan=float(bounds.donsker_varadhan(joint_n, apart)),
        nwj=float(bounds.nwj(joint_n + 1.0, apart + 1.0)),
        jensen_shannon=float(bounds.jensen_shannon(joint_n, apart)),
        info_nce=float(bounds.info_nce(score_nk.double())),
    )


def halves(pairs: FrozenPairs) -> tuple[Bools, Bools, str]:
    """Say which pairs the critic learns from and which are scored; no segment is in both."""
    names, counts = np.unique(pairs.document, return_counts=True)
    sizes, sides = [0, 0], np.zeros(len(names), dtype=np.int64)
    for place in np.argsort(-counts, kind="stable"):
        sides[place] = int(sizes[1] < sizes[0])
        sizes[sides[place]] += int(counts[place])
    if 3 * min(sizes) >= len(pairs):
        scored_n = sides[np.searchsorted(names, pairs.document)] == 1
        return ~scored_n, scored_n, "documents"
    learning_n, scored_n = np.zeros(len(pairs), dtype=bool), np.zeros(len(pairs), dtype=bool)
    for name in names:
        rows = np.flatnonzero(pairs.document == name)
        middle = pairs.number[rows[(len(rows) - 1) // 2]]
        learning_n[rows] = pairs.number[rows] < middle
        scored_n[rows] = pairs.number[rows] > middle  # the pair across the middle is in neither
    return learning_n, scored_n, "position"


def choice_scores(critic: Critic, pairs: FrozenPairs, choices: int, random: np.random.Generator) -> Tensor:
    """T of each first segment with its own next one and `choices - 1` others', [n, k]; the others are never its own
    next one or itself."""
    columns = [critic(pairs.first, pairs.next)]
    for _ in range(choices - 1):
        columns.append(critic(pairs.first, pairs.next[_others(pairs, np.arange(len(pairs)), random)]))
    return torch.stack(columns, dim=1)


def _others(pairs: FrozenPairs, rows_b: Ints, random: np.random.Generator) -> Tensor:
    """Rows whose next segment is neither that of `rows_b` nor its first, uniform, [b]."""
    n = len(pairs)
    drawn_b = random.integers(0, n - 1, size=len(rows_b))
    drawn_b += drawn_b >= rows_b
    # The row before stands for the first segment itself where it is this one's neighbour: draw those again.
    for _ in range(100):
        bad_b = (pairs.number[drawn_b] + 1 == pairs.number[rows_b]) | (drawn_b == rows_b)
        if not bad_b.any():
            break
        drawn_b[bad_b] = random.integers(0, n, size=int(bad_b.sum()))
    else:
        raise UserError("information: too few segments to draw a pair apart from")
    return torch.from_numpy(drawn_b).to(pairs.first.device)


def _fit(
    learn: FrozenPairs,
    watch: FrozenPairs,
    random: np.random.Generator,
    seed: int,
    hidden: int,
    steps: int,
    batch_size: int,
    lr: float,
) -> Critic:
    device = learn.first.device
    critic = Critic(learn.first.shape[1], hidden=hidden, dropout=0.0, seed=seed).to(device)
    for net in (critic.forth, critic.back):  # T = 0 at first: where nothing can be learned, every estimate stays 0
        nn.init.zeros_(net[-1].weight)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(critic.parameters(), lr=lr, betas=ADAM_BETAS)
    every = max(1, steps // 20)
    best, best_loss = copy.deepcopy(critic.state_dict()), float("inf")
    watched_random = np.random.default_rng([seed, 0x1F1])
    watched = [(np.arange(len(watch)), _others(watch, np.arange(len(watch)), watched_random)) for _ in range(4)]
    for step in range(steps + 1):
        if step % every == 0 or step == steps:
            with torch.no_grad():
                joint = critic(watch.first, watch.next)
                apart = torch.cat([critic(watch.first, watch.next[other]) for _, other in watched])
                loss = float(nsp_loss(joint, apart))
            if loss < best_loss:
                best, best_loss = copy.deepcopy(critic.state_dict()), loss
        rows = random.integers(0, len(learn), size=min(batch_size, len(learn)))
        own = torch.from_numpy(rows).to(device)
        first_bf = learn.first[own]
        loss_b = nsp_loss(critic(first_bf, learn.next[own]), critic(first_bf, learn.next[_others(learn, rows, random)]))
        optimizer.zero_grad(set_to_none=True)
        loss_b.backward()
        optimizer.step()
    critic.load_state_dict(best)
    return critic.eval()
