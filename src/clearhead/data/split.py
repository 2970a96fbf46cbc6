"""Which text is training, validation and test text.

By document whenever that is possible: whole documents go to one split. A source that has too few documents,
or one document that outweighs the rest, is cut by position instead: the first part of every document is
training text, a gap is left out, then comes validation, a gap, and test. `SplitPlan.how` says which it was
and why.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from clearhead.data.config import DataConfig
from clearhead.errors import UserError

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")

GAP_BYTES = 2048
"""Left out between two splits of one document (at most 1 % of it): no sentence is on both sides."""

_FULL_ENOUGH = 0.8  # a held-out split takes no further document once it has this much of its share
_NEAREST = 1000  # a cut moves forward to the next line, by at most this many bytes or 1 % of the document


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of document number `document` (before cuts are moved to a line's start)."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class SplitPlan:
    """Pieces of each split in reading order, and how they were chosen, in words."""

    pieces: dict[Split, list[Piece]]
    by: Literal["document", "position"]
    how: str


def plan_split(sizes: Sequence[int], config: DataConfig) -> SplitPlan:
    """Deal documents of `sizes` bytes (none empty, no two equal in content) to the three splits.

    Documents are shuffled by `split_seed`. Test is filled first, then validation: each takes the next
    document that brings it closer to its share of the bytes, and stops at 80 % of it. What is left is
    training text.

    Raises:
        UserError: when there is no text at all.
    """
    if not sizes:
        raise UserError("there is no text in the source: every document is empty")
    order = list(range(len(sizes)))
    random.Random(config.split_seed).shuffle(order)
    dealt, reason = _by_document(sizes, order, config)
    if reason:
        pieces = _by_position(sizes, config)
    else:
        pieces = {split: [Piece(d, 0, sizes[d]) for d in sorted(dealt[split])] for split in SPLITS}
    pieces = _limited(pieces, sizes, order, config)
    how = _in_words(pieces, reason, config, sum(sizes))
    return SplitPlan(pieces, "position" if reason else "document", how)


def _by_document(sizes: Sequence[int], order: list[int], config: DataConfig) -> tuple[dict[Split, list[int]], str]:
    """Return the documents of each split, or the reason why they cannot be dealt."""
    count = len(sizes)
    if count < len(SPLITS):
        return {}, f"the source has {'one document' if count == 1 else f'only {count} documents'}"
    total, left = sum(sizes), list(order)
    dealt: dict[Split, list[int]] = {"test": [], "val": []}
    shares: tuple[tuple[Split, float], ...] = (("test", config.test_fraction), ("val", config.val_fraction))
    for split, share in shares:
        target, have = share * total, 0
        for document in left:
            if have >= _FULL_ENOUGH * target:
                break
            if sizes[document] < 2 * (target - have):
                dealt[split].append(document)
                have += sizes[document]
        taken = set(dealt[split])
        left = [document for document in left if document not in taken]
        if not target / 4 <= have <= 3 * target:
            return {}, f"its documents are too few or too unequal to give {split} {share:.0%} of the text"
    dealt["train"] = left
    wanted = total * (1 - config.test_fraction - config.val_fraction)
    if sum(sizes[d] for d in left) < wanted / 2:
        return {}, "its documents are too few or too unequal to leave enough text for training"
    return dealt, ""


def _by_position(sizes: Sequence[int], config: DataConfig) -> dict[Split, list[Piece]]:
    pieces: dict[Split, list[Piece]] = {split: [] for split in SPLITS}
    for document, size in enumerate(sizes):
        gap = min(GAP_BYTES, size // 100)
        first = round(size * (1 - config.val_fraction - config.test_fraction))
        second = round(size * (1 - config.test_fraction))
        borders = {"train": (0, first), "val": (first + gap, second), "test": (second + gap, size)}
        for split in SPLITS:
            start, stop = borders[split]
            if stop > start:
                pieces[split].append(Piece(document, start, stop))
    return pieces


def _limited(
    pieces: dict[Split, list[Piece]], sizes: Sequence[int], order: list[int], config: DataConfig
) -> dict[Split, list[Piece]]:
    """Shrink every split in proportion to `max_bytes`: whole pieces in shuffled order, the last one cut."""
    total = sum(piece.stop - piece.start for split in SPLITS for piece in pieces[split])
    if config.max_bytes is None or total <= config.max_bytes:
        return pieces
    rank = {document: place for place, document in enumerate(order)}
    kept: dict[Split, list[Piece]] = {}
    for split in SPLITS:
        budget = config.max_bytes * sum(p.stop - p.start for p in pieces[split]) // total
        kept[split] = []
        for piece in sorted(pieces[split], key=lambda p: rank[p.document]):
            stop = min(piece.stop, piece.start + budget)
            if stop > piece.start:
                kept[split].append(Piece(piece.document, piece.start, stop))
                budget -= stop - piece.start
        kept[split].sort(key=lambda p: p.document)
    return kept


def _in_words(plan: dict[Split, list[Piece]], reason: str, config: DataConfig, available: int) -> str:
    """Say how the text was split, for the summary and the report."""
    if reason:
        train = 1 - config.val_fraction - config.test_fraction
        words = (
            f"by position, because {reason}: of each document the first {train:.0%} is for training, "
            f"then comes validation, then test, with up to {GAP_BYTES:,} bytes left out between"
        )
        if len({piece.document for split in SPLITS for piece in plan[split]}) == 1 and all(plan.values()):
            stretches = (f"{split} {plan[split][0].start:,} to {plan[split][0].stop:,}" for split in SPLITS)
            words += f" ({', '.join(stretches)})"
    else:
        words = f"by document ({', '.join(f'{len(plan[split])} {split}' for split in SPLITS)})"
    if config.max_bytes is not None and config.max_bytes < available:
        words += f"; cut to {config.max_bytes:,} bytes of {available:,}"
    return words


def cut(data: bytes, piece: Piece) -> bytes:
    """Return the bytes of `piece`, its cuts moved forward to the start of a line, or of a character.

    A cut depends on its own position alone, so a piece that ends where another begins shares no byte with it.
    """
    return data[_border(data, piece.start) : _border(data, piece.stop)]


def _border(data: bytes, position: int) -> int:
    if position <= 0 or position >= len(data):
        return max(0, min(position, len(data)))
    line = data.find(b"\n", position - 1, position + min(_NEAREST, len(data) // 100))
    if line >= 0:
        return line + 1
    while position < len(data) and data[position] & 0xC0 == 0x80:  # inside a UTF-8 character
        position += 1
    return position
