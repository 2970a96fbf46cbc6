"""Prepared pairs on disk: a safetensors file a split, appearing whole or not at all, checked by hash.

A folder holds `train.safetensors`, `val.safetensors`, `test.safetensors` (the tokens of all sources, of all targets,
and where each ends), `tokenizer.json` and `header.json` with the hash of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from clearhead.data.cache import file_sha256, new_folder
from clearhead.data.split import SPLITS, Split
from clearhead.data.store import TOKENIZER, seal, verified
from clearhead.data.tokenizer import Tokenizer, Tokens, load_tokenizer

FORMAT = 1
Encoded = tuple[Tokens, Tokens]
"""Source and target of a pair without separators."""


class Ragged:
    """Rows of unequal length in one array."""

    def __init__(self, tokens: npt.NDArray[Any], ends: npt.NDArray[np.int64]) -> None:
        self.tokens, self.ends = tokens, ends
        self.lengths = np.diff(ends, prepend=0)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, row: int | np.integer[Any]) -> Tokens:
        """Row `row`, [n] int64."""
        return self.tokens[self.ends[row] - self.lengths[row] : self.ends[row]].astype(np.int64)


@dataclass(frozen=True)
class PairStore:
    """Sources and targets of each split, their tokenizer, and the header of the folder they came from."""

    header: dict[str, Any]
    tokenizer: Tokenizer
    sides: dict[Split, tuple[Ragged, Ragged]]


def write_pairs(
    folder: Path, tokenizer: Tokenizer, pairs: Mapping[Split, Sequence[Encoded]], about: dict[str, Any]
) -> None:
    """Write a prepared folder, which appears when all of it is there; `about` goes into the header."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    with new_folder(folder) as building:
        for split in SPLITS:
            held = {}
            for side, name in enumerate(("source", "target")):
                rows = [pair[side] for pair in pairs[split]]
                held[name] = np.concatenate([np.zeros(0, np.int64), *rows]).astype(dtype)
                held[f"{name}_ends"] = np.cumsum([len(row) for row in rows], dtype=np.int64)
            save_file(held, building / f"{split}.safetensors")
        tokenizer.save(building / TOKENIZER)
        files = {name: file_sha256(building / name) for name in (TOKENIZER, *(f"{s}.safetensors" for s in SPLITS))}
        counts = {
            split: {
                "pairs": len(pairs[split]),
                "source_tokens": sum(len(source) for source, _ in pairs[split]),
                "target_tokens": sum(len(target) for _, target in pairs[split]),
            }
            for split in SPLITS
        }
        seal(building, FORMAT, files, {"vocab_size": tokenizer.vocab_size, "splits": counts, **about})


def open_pairs(folder: Path) -> PairStore | None:
    """Open and verify a prepared folder; None when there is none. Raises `Damaged` when a file was changed."""
    if not folder.is_dir():
        return None
    with verified(folder, FORMAT) as header:
        sides: dict[Split, tuple[Ragged, Ragged]] = {}
        for split in SPLITS:
            held = load_file(folder / f"{split}.safetensors")
            source, target = (Ragged(held[name], held[f"{name}_ends"]) for name in ("source", "target"))
            sides[split] = source, target
        return PairStore(header, load_tokenizer(folder / TOKENIZER), sides)
