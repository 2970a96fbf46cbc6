"""Text for language modelling: `prepare` a source once, then read batches and documents from it.

What stands where. The text of a split is one packed stream, `SEP document SEP document ... SEP`. A
separator opens the document that follows it, and as a target it says that the one before has ended: the
model learns where documents end. Attention never crosses a document (`Batch.segments`). The one target that
is ignored (-100) is a separator after a text that was cut, because nothing ends there. In evaluation every
byte of real text is scored once and no separator is.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.alphabets import ALPHABETS
from clearhead.data.cache import Progress, cache_folder, discard, json_sha256, tell, write_json
from clearhead.data.catalogue import CATALOGUE
from clearhead.data.config import DataConfig
from clearhead.data.lanes import lane_batch
from clearhead.data.letters import LetterTokenizer
from clearhead.data.sources import RawDocument, Source, resolve
from clearhead.data.split import SPLITS, Split, SplitPlan, cut, plan_split
from clearhead.data.store import Damaged, Document, EncodedDocument, Store, open_store, write_store
from clearhead.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from clearhead.errors import UserError, unknown

IGNORE = -100
"""The target that no loss counts (PyTorch's `ignore_index`)."""


@dataclass(frozen=True)
class Batch:
    """Windows of the packed stream, int64, each [b, t]."""

    tokens: npt.NDArray[np.int64]
    targets: npt.NDArray[np.int64]
    """The next token of each position; -100 where it must not be learned."""
    segments: npt.NDArray[np.int64]
    """Number of the document within the window, from 0; a separator belongs to the document that it opens."""


class TextData:
    """Prepared text: three splits of tokens with their tokenizer. Made by `prepare`."""

    def __init__(self, config: DataConfig, store: Store, notes: list[str]) -> None:
        self.config = config
        self.tokenizer: Tokenizer = store.tokenizer
        self.vocab_size = store.tokenizer.vocab_size
        self.fingerprint: str = store.header["fingerprint"]
        """Equal for two runs if and only if their tokens, documents and tokenizer are equal."""
        self._store = store
        self._notes = [*store.header["notes"], *notes]
        self._separators: dict[Split, npt.NDArray[np.int64]] = {}
        self._cut_ends = {split: store.cut_ends(split) for split in SPLITS}

    @property
    def summary(self) -> dict[str, Any]:
        """Return what a report says about the text, as plain values."""
        header = self._store.header
        return {
            "source": header["source"]["label"],
            "licence": header["source"]["licence"],
            "split": header["split"],
            "splits": header["splits"],
            "tokenizer": self.tokenizer.kind,
            "vocab_size": self.vocab_size,
            "fingerprint": self.fingerprint,
            "notes": list(self._notes),
        }

    def describe(self) -> list[str]:
        """Return the summary as lines for a person."""
        about = self.summary
        sizes = (
            f"{split} {values['bytes'] / 1e6:.3g} MB, {values['tokens']:,} tokens"
            for split, values in about["splits"].items()
        )
        return [
            f"{about['source']} ({about['licence']})",
            f"split {about['split']['how']}",
            "; ".join(sizes) + f"; tokenizer {about['tokenizer']}, {about['vocab_size']:,} ids",
            *self._notes,
        ]

    def documents(self, split: str) -> list[Document]:
        """Return the documents of a split, in reading order, as views of the memory-mapped tokens."""
        return self._store.documents(as_split(split))

    def stream(self, split: str) -> npt.NDArray[Any]:
        """Return the packed tokens of a split (uint16 or uint32, memory-mapped, read-only)."""
        return self._store.stream(as_split(split))

    def batch(self, split: str, batch_size: int, context: int, seed: int, step: int) -> Batch:
        """Return the batch of one step: a pure function of the arguments and the fingerprint.

        Every row is a window of `context` tokens whose start is drawn uniformly from the split's packed
        stream.

        Raises:
            UserError: when the split is shorter than one window.
            ValueError: for a seed or step below 0, or a size below 1.
        """
        name, stream = self._asked(split, batch_size, context, seed, step)
        random = np.random.default_rng([seed, step, SPLITS.index(name)])
        starts_b = random.integers(0, len(stream) - context, size=batch_size)
        index_bt = starts_b[:, None] + np.arange(context + 1)
        window_bt = np.asarray(stream[index_bt], dtype=np.int64)
        tokens_bt, targets_bt = window_bt[:, :-1], window_bt[:, 1:].copy()
        if len(self._cut_ends[name]):
            targets_bt[np.isin(index_bt[:, 1:], self._cut_ends[name])] = IGNORE
        opens_bt = tokens_bt == self.tokenizer.separator
        segments_bt = np.cumsum(opens_bt, axis=1) - opens_bt[:, :1]
        return Batch(tokens_bt.copy(), targets_bt, segments_bt)

    def _asked(self, split: str, batch_size: int, context: int, seed: int, step: int) -> tuple[Split, npt.NDArray[Any]]:
        """The split that a batch is asked of and its packed tokens; raises as `batch` says."""
        if batch_size < 1 or context < 1 or seed < 0 or step < 0:
            raise ValueError(
                "expected batch_size >= 1, context >= 1, seed >= 0 and step >= 0, got "
                f"{batch_size}, {context}, {seed} and {step}"
            )
        name = as_split(split)
        stream = self._store.stream(name)
        _require(self.config.source, name, len(stream), context)
        return name, stream

    def lanes(self, split: str, batch_size: int, context: int, seed: int, step: int) -> Batch:
        """Return the batch of one step in which every row goes on where it stopped (see `data/lanes.py`).

        Segments number the documents through all steps. Raises as `batch` does.
        """
        name, stream = self._asked(split, batch_size, context, seed, step)
        if name not in self._separators:
            self._separators[name] = np.flatnonzero(stream[:-1] == self.tokenizer.separator)
        tokens_bt, targets_bt, number_bt, next_bt = lane_batch(
            stream, self._separators[name], batch_size, context, seed, step
        )
        if len(self._cut_ends[name]):
            targets_bt[np.isin(next_bt, self._cut_ends[name])] = IGNORE
        return Batch(tokens_bt, targets_bt, number_bt)

    def batches(self, split: str, batch_size: int, context: int, seed: int, start_step: int = 0) -> Iterator[Batch]:
        """Yield the batches of `start_step`, `start_step + 1`, ... without end."""
        for step in count(start_step):
            yield self.batch(split, batch_size, context, seed, step)


def prepare(config: DataConfig, *, progress: Progress | None = None) -> TextData:
    """Return the text of `config`, prepared at the first call and taken from the cache folder afterwards.

    The source's bytes are hashed every time, so edited text is prepared anew; every file of the prepared
    folder is checked against its hash, and a damaged folder is rebuilt. When the source is gone (or cannot
    be fetched any more) but its prepared text is whole, that is used, and the summary says so. Processes
    may prepare the same text at once.

    Args:
        config: what to read and how to cut it.
        progress: called with one line at each longer stage.

    Raises: UserError: in one line, for a source that is missing or unreadable, bytes that are not UTF-8,
        JSON lines without text, empty text, or too little text for the context.
    """
    request = _prepared() / "requests" / f"{_request_key(config)}.json"
    try:
        source = resolve(config.source, progress)
        digest = source.digest()
    except UserError as error:
        data = _from_earlier(config, request, error)
        tell(progress, data.describe()[-1])
        return data
    key = json_sha256({"request": _request_values(config), "label": source.label, "digest": digest})[:24]
    folder = _prepared() / key
    store = None
    try:
        store = open_store(folder)
    except Damaged as error:
        tell(progress, f"{error}; the text is prepared again from {source.label}")
        discard(folder)
    if store is None:
        tell(progress, f"{source.label}: preparing text")
        _build(config, source, digest, folder, progress)
        store = open_store(folder)
        assert store is not None  # _build has just published it
    data = TextData(config, store, [])
    _require_context(data)
    _remember(request, key)
    return data


def as_split(name: str) -> Split:
    """Return the split called `name`; raise `UserError` otherwise."""
    for split in SPLITS:
        if name == split:
            return split
    raise unknown("split", name, SPLITS)


def _require(source: str, split: Split, length: int, context: int) -> None:
    if length < context + 1:
        raise UserError(
            f"too little text in {source}: its {split} split has {length} tokens, a context of {context} "
            f"needs {context + 1}; give more text or lower --data.context"
        )


def _require_context(data: TextData) -> None:
    for split in SPLITS:
        _require(data.config.source, split, len(data.stream(split)), data.config.context)


def _prepared() -> Path:
    return cache_folder() / "prepared"


def _request_values(config: DataConfig) -> dict[str, Any]:
    """Return what decides the tokens, apart from the source: all but the context and what bytes ignore."""
    values = config.to_dict()
    del values["context"], values["source"], values["tokenizer_of"]
    if config.tokenizer == "pretrained":  # which folder it lies in says nothing about its tokens, its content does
        values["tokenizer_sha256"] = json_sha256(_pretrained(config).to_dict())
    elif config.tokenizer != "bpe":
        del values["vocab_size"]
    return values


@lru_cache(maxsize=2)
def _pretrained(config: DataConfig) -> Tokenizer:
    from clearhead.data.pretrained_tokenizer import PretrainedTokenizer

    tokenizer = PretrainedTokenizer.of_model(config.tokenizer_of)
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"data.vocab_size={config.vocab_size}: the tokenizer of {config.tokenizer_of} has {tokenizer.vocab_size} "
            f"ids; set data.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _request_key(config: DataConfig) -> str:
    source = config.source if config.source in CATALOGUE else str(Path(config.source).expanduser().absolute())
    return json_sha256({"source": source} | _request_values(config))[:24]


def _remember(request: Path, key: str) -> None:
    """Note, where that is possible, which folder answered this request: its source may be gone one day."""
    with contextlib.suppress(OSError):
        if not request.exists() or json.loads(request.read_text(encoding="utf-8")).get("key") != key:
            request.parent.mkdir(parents=True, exist_ok=True)
            write_json(request, {"key": key, "prepared": time.strftime("%Y-%m-%d")})


def _from_earlier(config: DataConfig, request: Path, reason: UserError) -> TextData:
    try:
        memory = json.loads(request.read_text(encoding="utf-8"))
        store = open_store(_prepared() / memory["key"])
    except (OSError, ValueError, KeyError):
        raise reason from None
    except Damaged as error:
        raise UserError(f"{error}, and it cannot be prepared again: {reason}") from error
    if store is None:
        raise reason
    note = f"the source is not there ({reason}); this is the text as it was prepared on {memory['prepared']}"
    data = TextData(config, store, [note])
    _require_context(data)
    return data


def _build(config: DataConfig, source: Source, digest: str, folder: Path, progress: Progress | None) -> None:
    """Read the source document by document: once to plan the split, once to learn BPE, once to encode."""
    if config.tokenizer == "bpe" and any(file.reader() for file in source.files):
        raise UserError(
            f"{source.label} holds sequences, and bpe learns inside words, of which they have none; take "
            f"data.tokenizer=bytes, {', '.join(ALPHABETS)}"
        )
    kept, sizes, notes = _survey(source)
    plan = plan_split(sizes, config)
    tokenizer: Tokenizer = ByteTokenizer()
    if config.tokenizer in ALPHABETS:
        tokenizer = LetterTokenizer(ALPHABETS[config.tokenizer])
    if config.tokenizer == "bpe":
        tell(progress, f"{source.label}: learning {config.vocab_size:,} byte pairs from the training text")
        texts = (piece.data.decode() for split, piece, _ in _pieces(source, kept, plan) if split == "train")
        tokenizer = BPETokenizer.train(texts, config.vocab_size)
        if tokenizer.vocab_size < config.vocab_size:
            notes.append(f"the training text gives {tokenizer.vocab_size} ids of {config.vocab_size} asked for")
    if config.tokenizer == "pretrained":
        tokenizer = _pretrained(config)
        first = next(piece.data.decode() for _, piece, _ in _pieces(source, kept, plan))
        if tokenizer.decode(tokenizer.encode(first)) != first:
            notes.append(
                f"the tokenizer of {config.tokenizer_of} does not give a text back as it was; bits per byte count the "
                f"bytes of the text itself"
            )
    encoded = (
        EncodedDocument(split, piece.name, tokenizer.encode(piece.data.decode()), len(piece.data), whole)
        for split, piece, whole in _pieces(source, kept, plan)
    )
    about = {
        "source": {"label": source.label, "licence": source.licence, "digest": digest},
        "split": {"by": plan.by, "how": plan.how},
        "request": _request_values(config),
        "notes": notes,
    }
    write_store(folder, tokenizer, encoded, about)


def _survey(source: Source) -> tuple[dict[int, tuple[int, bytes]], list[int], list[str]]:
    """Pass over the documents once: which to keep (reading number -> place, content key), their sizes, notes.

    Documents of equal content are kept once, so that none can stand on two sides of the split.
    """
    kept: dict[int, tuple[int, bytes]] = {}
    sizes: list[int] = []
    seen: set[bytes] = set()
    empty = copies = 0
    for number, document in enumerate(source.documents()):
        if not document.data.strip():
            empty += 1
            continue
        content = document.content_key()
        if content in seen:
            copies += 1
            continue
        seen.add(content)
        kept[number] = (len(sizes), content)
        sizes.append(len(document.data))
    notes = []
    if empty:
        notes.append(f"left out: {empty} empty document{'s'[: empty > 1]}")
    if copies:
        notes.append(f"left out: {copies} document{'s'[: copies > 1]} with the same text as another")
    if not sizes:
        raise UserError(f"there is no text in {source.label}: it is empty")
    return kept, sizes, notes


def _pieces(
    source: Source, kept: dict[int, tuple[int, bytes]], plan: SplitPlan
) -> Iterator[tuple[Split, RawDocument, bool]]:
    """Yield (split, text, whole) in reading order: the documents again, cut as planned."""
    places: dict[int, list[tuple[Split, Any]]] = {}
    for split in SPLITS:
        for piece in plan.pieces[split]:
            places.setdefault(piece.document, []).append((split, piece))
    found = 0
    for number, document in enumerate(source.documents()):
        if number not in kept:
            continue
        place, content = kept[number]
        if document.content_key() != content:
            raise UserError(f"{source.label} changed while it was read ({document.name}); run again")
        found += 1
        for split, piece in places.get(place, ()):
            text = cut(document.data, piece)
            if text:
                yield split, RawDocument(document.name, text), piece.stop == len(document.data)
    if found != len(kept):
        raise UserError(f"{source.label} changed while it was read; run again")
