"""MiniLM under other attentions: do the vectors of verses stay what they were, and do they still find their paraphrase?

A verse of the King James Version and the same verse of the World English Bible say the same in words that are partly
the same. Two tasks on the same text: single verses (about 30 tokens), and passages of ten verses (about 250 tokens),
where a block pattern has something to leave out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from scipy import stats
from torch import Tensor

from clearhead.data import catalogue
from experiments.adopt_encoders.under import OWN, opened, tokenizer, under

LONGEST = 256
"""Tokens: what the model was trained to read."""
GROUPS = {"verses": 10, "passages": 5}
"""Disjoint groups of texts, over which the interval of a correlation is taken."""


@dataclass(frozen=True)
class Job:
    """One attention on one task."""

    task: str
    attention: str
    pairs: int
    seed: int = 0


@lru_cache(maxsize=1)
def bibles() -> list[tuple[str, str]]:
    """All 31,102 verses in both translations, in order."""
    kings = [
        line
        for book in sorted(catalogue.path("bible-kjv").glob("*.txt"))
        for line in book.read_text(encoding="utf-8").splitlines()
        if line
    ]
    rows = (catalogue.path("verses") / "en.tsv").read_text(encoding="utf-8").splitlines()
    worlds = [row.split("\t")[1] for row in rows]
    if len(kings) != len(worlds):
        raise ValueError(f"the translations have {len(kings)} and {len(worlds)} verses")
    return list(zip(kings, worlds, strict=True))


@lru_cache(maxsize=4)
def pairs_of(task: str, count: int, seed: int) -> tuple[list[str], list[str]]:
    """Texts of the one translation and of the other, drawn without replacement."""
    verses = bibles()
    draw = random.Random(seed)
    if task == "verses":
        fit = [i for i, (a, b) in enumerate(verses) if 8 <= min(len(a.split()), len(b.split())) <= 30]
        chosen = [verses[i] for i in draw.sample(fit, count)]
    else:
        starts = draw.sample(range(len(verses) // 10), count)
        chosen = [tuple(" ".join(part) for part in zip(*verses[10 * s : 10 * s + 10], strict=True)) for s in starts]
    return [a for a, _ in chosen], [b for _, b in chosen]


@lru_cache(maxsize=1)
def loaded() -> tuple[Any, Any]:
    """Model and tokenizer."""
    return opened("minilm"), tokenizer("minilm")


@torch.no_grad()
def vectors(model: Any, texts: Sequence[str], batch: int = 16) -> Tensor:
    """Unit vectors [n, d]: the mean over the tokens that are there."""
    reader = loaded()[1]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found: dict[int, Tensor] = {}
    for start in range(0, len(texts), batch):
        places = order[start : start + batch]
        chosen = [texts[i] for i in places]
        inputs = reader(chosen, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        seen_bt1 = inputs.attention_mask[..., None]
        mean_bd = (model(**inputs).last_hidden_state * seen_bt1).sum(1) / seen_bt1.sum(1)
        found.update(zip(places, torch.nn.functional.normalize(mean_bd, dim=-1), strict=True))
    return torch.stack([found[i] for i in range(len(texts))])


@lru_cache(maxsize=2)
def own_vectors(task: str, count: int, seed: int) -> Tensor:
    """What the unpatched model says of both sides, [2 n, d]."""
    ones, others = pairs_of(task, count, seed)
    return vectors(loaded()[0], [*ones, *others])


def measure(job: Job) -> dict[str, Any]:
    """Distance to the unpatched vectors, retrieval of the other translation, and rank correlation of similarities."""
    torch.set_num_threads(1)
    ones, others = pairs_of(job.task, job.pairs, job.seed)
    before_nd = own_vectors(job.task, job.pairs, job.seed)
    with under(loaded()[0], job.attention) as model:
        after_nd = before_nd if job.attention == OWN else vectors(model, [*ones, *others])
    left_nd, right_nd = after_nd.chunk(2)
    similarity_nn = left_nd @ right_nd.T
    same_n = similarity_nn.diagonal()
    n = len(same_n)
    return {
        "task": job.task,
        "pairs": n,
        "largest_difference": float((after_nd - before_nd).abs().max()),
        "kept_n": [round(float(x), 4) for x in (after_nd * before_nd).sum(-1)],
        "found": "".join("01"[int(i == hit)] for i, hit in enumerate(similarity_nn.argmax(-1))),
        "same": float(same_n.mean()),
        "other": float((similarity_nn.sum() - same_n.sum()) / (n * n - n)),
        "ranks": rank_correlations(before_nd, after_nd, GROUPS[job.task]),
    } | ({"by_words": by_words(job.task, job.pairs, job.seed)} if job.attention == OWN else {})


def rank_correlations(before_nd: Tensor, after_nd: Tensor, groups: int) -> list[float]:
    """Spearman's correlation of all similarities within each of `groups` disjoint groups of texts.

    A group holds both translations of its share of the pairs; groups share no text, so their spread is one of samples.
    """
    n = len(before_nd) // 2
    answer = []
    for group in range(groups):
        ones = torch.arange(group * n // groups, (group + 1) * n // groups)
        places = torch.cat([ones, ones + n])
        upper = torch.triu_indices(len(places), len(places), 1)
        first, second = (x[places] @ x[places].T for x in (before_nd, after_nd))
        value = stats.spearmanr(first[upper[0], upper[1]].numpy(), second[upper[0], upper[1]].numpy()).statistic
        answer.append(float(value))
    return answer


def by_words(task: str, pairs: int, seed: int) -> float:
    """Share of texts that find their other translation by shared words alone (Jaccard): how hard the task is."""
    ones, others = pairs_of(task, pairs, seed)
    sets = [[set(re.findall("[a-z]+", text.lower())) for text in texts] for texts in (ones, others)]
    hits = 0
    for i, words in enumerate(sets[0]):
        scores = [len(words & other) / max(len(words | other), 1) for other in sets[1]]
        hits += scores.index(max(scores)) == i
    return hits / len(ones)
