"""Sentence pairs for translation: `prepare_pairs` a source once, then read batches and pairs from it.

One tokenizer serves both languages. The encoder reads `x_1 ... x_n SEP`; the decoder reads `SEP y_1 ... y_m` and
learns `y_1 ... y_m SEP`: the separator begins a target and ends it. A pair of which either side has more than
`config.context` tokens, the separator included, is left out, and `left_out` says how many there are.

Legend: b batch, s source tokens, t target tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.cache import Progress, cache_folder, discard, json_sha256, tell
from clearhead.data.config import DataConfig
from clearhead.data.pair_sources import PairSource, RawPair, resolve_pairs
from clearhead.data.pair_split import split_pairs
from clearhead.data.pair_store import Encoded, PairStore, Ragged, open_pairs, write_pairs
from clearhead.data.split import SPLITS, Split
from clearhead.data.store import Damaged
from clearhead.data.text import IGNORE, as_split
from clearhead.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from clearhead.errors import UserError

BUCKET_BATCHES = 50
"""So many batches' worth of shuffled pairs are sorted by length together, so that a batch is padded little."""


@dataclass(frozen=True)
class PairBatch:
    """Pairs, padded on the right to the longest of the batch; int64 [b, s] and [b, t], bool `source_valid`."""

    source: npt.NDArray[np.int64]
    source_valid: npt.NDArray[np.bool_]
    tokens: npt.NDArray[np.int64]
    """What the decoder reads; padding holds the separator, and no real token sees it."""
    targets: npt.NDArray[np.int64]
    """The next token of each position; -100 at padding."""


class PairData:
    """Prepared pairs: three splits of tokens with their tokenizer. Made by `prepare_pairs`."""

    def __init__(self, config: DataConfig, store: PairStore) -> None:
        self.config = config
        self.tokenizer: Tokenizer = store.tokenizer
        self.vocab_size = store.tokenizer.vocab_size
        self.fingerprint: str = store.header["fingerprint"]
        """Equal for two runs if and only if their pairs and tokenizer are equal."""
        self.header = store.header
        self._sides = store.sides
        self._fitting = {
            split: np.flatnonzero(np.maximum(source.lengths, target.lengths) < config.context)
            for split, (source, target) in store.sides.items()
        }
        self.left_out = {split: len(store.sides[split][0]) - len(self._fitting[split]) for split in SPLITS}
        self._epoch: tuple[tuple[object, ...], npt.NDArray[np.int64]] | None = None  # the last one, made again at need
        for split in SPLITS:
            if not len(self._fitting[split]):
                raise UserError(
                    f"too few pairs in {config.source}: its {split} split has none of at most {config.context} tokens "
                    f"a side; give more pairs or raise the context"
                )

    @property
    def summary(self) -> dict[str, Any]:
        """Return what a report says about the pairs, as plain values."""
        header = self.header
        return {
            "source": header["source"]["label"],
            "licence": header["source"]["licence"],
            "split": header["split"],
            "splits": header["splits"],
            "left_out_too_long": dict(self.left_out),
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "notes": list(header["notes"]),
        }

    def describe(self) -> list[str]:
        """Return the summary as lines for a person."""
        about = self.summary
        sizes = (
            f"{split} {values['pairs']:,} pairs, {values['source_tokens']:,} to {values['target_tokens']:,} tokens"
            for split, values in about["splits"].items()
        )
        long = ", ".join(f"{count:,} {split}" for split, count in self.left_out.items())
        return [
            f"{about['source']} ({about['licence']})",
            f"split {about['split']['how']}",
            "; ".join(sizes) + f"; tokenizer {about['tokenizer']}, {about['vocab_size']:,} ids",
            *about["notes"],
            f"longer than {self.config.context} tokens on a side and not used: {long}",
        ]

    def count(self, split: str) -> int:
        """Return how many pairs of a split fit the context."""
        return len(self._fitting[as_split(split)])

    def pairs(self, split: str) -> list[Encoded]:
        """Return (source, target) tokens of the pairs that fit, in reading order, without separators."""
        source, target = self._sides[as_split(split)]
        return [(source[row], target[row]) for row in self._fitting[as_split(split)]]

    def batch(self, split: str, batch_size: int, context: int, seed: int, step: int) -> PairBatch:
        """Return the batch of one step: a pure function of the arguments and the fingerprint.

        Epoch by epoch: all pairs are shuffled, cut into groups of `BUCKET_BATCHES` batches, sorted by length within a
        group, cut into batches, and the batches are shuffled. What does not fill a batch waits for another epoch.
        Of fewer pairs than a batch has rows, some are repeated. `context` must be the config's, by which pairs were
        chosen.

        Raises `ValueError` for a seed or step below 0, a size below 1, or another context.
        """
        if batch_size < 1 or seed < 0 or step < 0 or context != self.config.context:
            raise ValueError(
                f"expected batch_size >= 1, seed >= 0, step >= 0 and context={self.config.context}, got "
                f"{batch_size}, {seed}, {step} and {context}"
            )
        name = as_split(split)
        fitting = self._fitting[name]
        steps = max(len(fitting) // batch_size, 1)
        epoch, place = divmod(step, steps)
        key = (name, batch_size, seed, epoch)
        if self._epoch is None or self._epoch[0] != key:
            random = np.random.default_rng([seed, epoch, SPLITS.index(name), 0x9A1E5])
            self._epoch = key, self._order(fitting, batch_size, steps, name, random)
        source, target = self._sides[name]
        rows = self._epoch[1][place]
        return pad_pairs([(source[row], target[row]) for row in rows], self.tokenizer.separator)

    def _order(
        self,
        fitting: npt.NDArray[np.int64],
        batch_size: int,
        steps: int,
        split: Split,
        random: np.random.Generator,
    ) -> npt.NDArray[np.int64]:
        """Rows of an epoch's batches, [steps, b]."""
        source, target = self._sides[split]
        order = np.resize(random.permutation(fitting), steps * batch_size)
        group = batch_size * BUCKET_BATCHES
        for first in range(0, len(order), group):
            part = order[first : first + group]
            part[:] = part[np.lexsort((source.lengths[part], target.lengths[part]))]
        return random.permutation(order.reshape(steps, batch_size))


def pad_pairs(pairs: list[Encoded], separator: int) -> PairBatch:
    """Put separators at their places and pad on the right."""
    rows = len(pairs)
    width_s = 1 + max(len(source) for source, _ in pairs)
    width_t = 1 + max(len(target) for _, target in pairs)
    source_bs = np.full((rows, width_s), separator, dtype=np.int64)
    valid_bs = np.zeros((rows, width_s), dtype=np.bool_)
    tokens_bt = np.full((rows, width_t), separator, dtype=np.int64)
    targets_bt = np.full((rows, width_t), IGNORE, dtype=np.int64)
    for row, (source, target) in enumerate(pairs):
        source_bs[row, : len(source)] = source
        valid_bs[row, : len(source) + 1] = True
        tokens_bt[row, 1 : len(target) + 1] = target
        targets_bt[row, : len(target)] = target
        targets_bt[row, len(target)] = separator
    return PairBatch(source_bs, valid_bs, tokens_bt, targets_bt)


def prepare_pairs(config: DataConfig, *, progress: Progress | None = None) -> PairData:
    """Return the pairs of `config`, prepared at the first call and taken from the cache folder afterwards.

    The source's bytes are hashed every time, so an edited file is prepared anew; a damaged folder is rebuilt.

    Raises `UserError`, in one line, for a source that is missing or unreadable, and for too few pairs.
    """
    if config.tokenizer == "pretrained":
        raise UserError("data.tokenizer=pretrained is for running text; sentence pairs take bytes or bpe")
    source = resolve_pairs(config.source, progress)
    request = config.to_dict()
    del request["context"], request["source"], request["tokenizer_of"]
    if config.tokenizer != "bpe":
        del request["vocab_size"]
    key = json_sha256({"pairs": request, "label": source.label, "digest": source.digest()})[:24]
    folder = cache_folder() / "prepared" / key
    store = None
    try:
        store = open_pairs(folder)
    except Damaged as error:
        tell(progress, f"{error}; the pairs are prepared again from {source.label}")
        discard(folder)
    if store is None:
        tell(progress, f"{source.label}: preparing pairs")
        write_pairs(folder, *_build(config, source, request, progress))
        store = open_pairs(folder)
        assert store is not None  # it has just been published
    return PairData(config, store)


def pairs_for(tokenizer: Tokenizer, config: DataConfig, *, progress: Progress | None = None) -> PairData:
    """Return the pairs of `config` in the tokens of `tokenizer`, whatever tokenizer the config names.

    What scoring a trained model on other pairs needs: it meets the tokens it was trained with.
    """
    plain = dataclasses.replace(config, tokenizer="bytes", tokenizer_of="", context=1 << 30)
    data = prepare_pairs(plain, progress=progress)
    sides: dict[Split, tuple[Ragged, Ragged]] = {}
    for split in SPLITS:
        texts = [[data.tokenizer.decode(side) for side in pair] for pair in data.pairs(split)]
        rows = [[tokenizer.encode(text) for text in pair] for pair in texts]
        made = [Ragged(np.concatenate(side), np.cumsum([len(row) for row in side])) for side in zip(*rows, strict=True)]
        sides[split] = made[0], made[1]
    return PairData(config, PairStore(data.header, tokenizer, sides))


def _build(
    config: DataConfig, source: PairSource, request: dict[str, Any], progress: Progress | None
) -> tuple[Tokenizer, dict[Split, list[Encoded]], dict[str, Any]]:
    pairs, notes = _survey(source)
    plan = split_pairs(pairs, config)
    notes += plan.notes
    tokenizer: Tokenizer = ByteTokenizer()
    if config.tokenizer == "bpe":
        tell(
            progress, f"{source.label}: learning {config.vocab_size:,} byte pairs from both sides of the training pairs"
        )
        train = (pairs[number] for number in plan.pairs["train"])
        tokenizer = BPETokenizer.train((text for p in train for text in (p.source, p.target)), config.vocab_size)
        if tokenizer.vocab_size < config.vocab_size:
            notes.append(f"the training pairs give {tokenizer.vocab_size} ids of {config.vocab_size} asked for")
    encoded = {split: list(_encoded(tokenizer, pairs, plan.pairs[split])) for split in SPLITS}
    about = {
        "source": {"label": source.label, "licence": source.licence},
        "split": {"by": plan.by, "how": plan.how},
        "request": request,
        "notes": notes,
    }
    return tokenizer, encoded, about


def _survey(source: PairSource) -> tuple[list[RawPair], list[str]]:
    """Read all pairs: those with text on both sides that differ (equal sides were not translated), and notes."""
    pairs, empty, same = [], 0, 0
    for pair in source.read():
        if not pair.source.strip() or not pair.target.strip():
            empty += 1
        elif pair.source == pair.target:
            same += 1
        else:
            pairs.append(pair)
    notes = []
    if empty:
        notes.append(f"left out: {empty:,} pairs with an empty side")
    if same:
        notes.append(f"left out: {same:,} pairs whose sides are equal (not translated)")
    if len(pairs) < len(SPLITS):
        raise UserError(f"{source.label}: expected at least {len(SPLITS)} pairs with two sides, got {len(pairs)}")
    return pairs, notes


def _encoded(tokenizer: Tokenizer, pairs: list[RawPair], numbers: list[int]) -> Iterator[Encoded]:
    for number in numbers:
        yield tokenizer.encode(pairs[number].source), tokenizer.encode(pairs[number].target)
