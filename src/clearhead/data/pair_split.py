"""Which pairs are training, validation and test pairs, so that no sentence stands on two sides.

First whole documents (books, pages) are dealt to the splits, as for running text. Then sentences that came to more than
one split are left out of the larger one: a pair stays out of training when its source or its target is also in
validation or test, and out of validation when it is in test. Equal means equal but for case and white space.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass

from clearhead.data.config import DataConfig
from clearhead.data.pair_sources import RawPair
from clearhead.data.split import SPLITS, Split, plan_split


@dataclass(frozen=True)
class PairSplit:
    """Numbers of the pairs of each split in reading order, and how they were chosen, in words."""

    pairs: dict[Split, list[int]]
    by: str
    """document | pair."""
    how: str
    notes: tuple[str, ...]
    """What was left out, with counts."""


def split_pairs(pairs: Sequence[RawPair], config: DataConfig) -> PairSplit:
    """Deal `pairs` (none empty) to the three splits; see the top of this file."""
    sizes = [len(pair.source.encode()) + len(pair.target.encode()) for pair in pairs]
    groups: dict[str, list[int]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(pair.document or f"\0{number}", []).append(number)
    members, by, why = list(groups.values()), "document", ""
    # The limit is applied below: a plan for bytes could cut a pair in two.
    unlimited = dataclasses.replace(config, max_bytes=None)
    plan = plan_split([sum(sizes[n] for n in group) for group in members], unlimited)
    if plan.by == "position" or len(members) == len(pairs):
        by = "pair"
        if len(members) < len(pairs):
            why = ", because its documents are too few or too unequal"
            members = [[n] for n in range(len(pairs))]
            plan = plan_split(sizes, unlimited)
    if plan.by == "position":  # a handful of pairs: deal them one by one
        dealt = _one_by_one(len(pairs))
    else:
        dealt = {split: [n for piece in plan.pieces[split] for n in members[piece.document]] for split in SPLITS}
    counts = ", ".join(f"{len(plan.pieces[split])} {split}" for split in SPLITS)
    how = f"by document ({counts})" if by == "document" else f"by pair{why}"
    kept, notes = _without_copies(pairs, dealt)
    if config.max_bytes is not None:
        available = sum(sizes[n] for split in SPLITS for n in kept[split])
        if config.max_bytes < available:
            limit, seed = config.max_bytes, config.split_seed
            kept = {split: _within(kept[split], sizes, limit, available, seed) for split in SPLITS}
            how += f"; cut to {config.max_bytes:,} bytes of {available:,}"
    return PairSplit(kept, by, how, tuple(notes))


def _one_by_one(count: int) -> dict[Split, list[int]]:
    return {
        "test": [n for n in range(count) if n % 10 == 4] or [0],
        "val": [n for n in range(count) if n % 10 == 9] or [0],
        "train": [n for n in range(count) if n % 10 not in (4, 9)],
    }


def _without_copies(
    pairs: Sequence[RawPair], dealt: dict[Split, list[int]]
) -> tuple[dict[Split, list[int]], list[str]]:
    seen: tuple[set[str], set[str]] = (set(), set())  # sources and targets of the splits that were filled before
    kept: dict[Split, list[int]] = {}
    notes = []
    order: tuple[Split, ...] = ("test", "val", "train")
    for split in order:
        elsewhere = copies = 0
        own: dict[tuple[str, str], int] = {}
        for number in dealt[split]:
            keys = _key(pairs[number].source), _key(pairs[number].target)
            if keys[0] in seen[0] or keys[1] in seen[1]:
                elsewhere += 1
            elif keys in own:
                copies += 1
            else:
                own[keys] = number
        kept[split] = list(own.values())
        for source, target in own:
            seen[0].add(source)
            seen[1].add(target)
        if copies:
            notes.append(f"left out of {split}: {copies:,} copies of other pairs in it")
        if elsewhere:
            others = " or ".join(order[: order.index(split)])
            notes.append(f"left out of {split}: {elsewhere:,} pairs whose source or target is also in {others}")
    return kept, notes


def _key(text: str) -> str:
    return " ".join(text.casefold().split())


def _within(numbers: list[int], sizes: Sequence[int], limit: int, available: int, seed: int) -> list[int]:
    """Shrink a split in proportion to the limit: pairs in shuffled order, so that less is always a part of more."""
    budget = limit * sum(sizes[n] for n in numbers) / available
    order = list(numbers)
    random.Random(seed).shuffle(order)
    kept: list[int] = []
    taken = 0
    for number in order:
        taken += sizes[number]
        if taken > budget and kept:
            break
        kept.append(number)
    return sorted(kept)
