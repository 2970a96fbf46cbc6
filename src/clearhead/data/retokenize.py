"""Documents of any text in the tokens of a given tokenizer: what scoring a trained model on other text needs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from clearhead.data.cache import Progress
from clearhead.data.config import DataConfig
from clearhead.data.split import SPLITS
from clearhead.data.store import Document
from clearhead.data.text import prepare
from clearhead.data.tokenizer import Tokenizer
from clearhead.errors import unknown

ALL = "all"


@dataclass
class DocumentSet:
    """A split's documents, already encoded; `train.evaluate.evaluate` reads it like a `TextData`."""

    config: DataConfig
    split: str
    _documents: tuple[Document, ...]

    def documents(self, split: str) -> list[Document]:
        """Return the documents; `split` must be the one that this set was made for."""
        if split != self.split:
            raise unknown("split", split, [self.split])
        return list(self._documents)


def documents_for(
    tokenizer: Tokenizer, config: DataConfig, split: str, *, progress: Progress | None = None
) -> DocumentSet:
    """Return the documents of `split` of `config`, encoded by `tokenizer` whatever tokenizer `config` names.

    `split` may be "all": every document of the source. The split of a source does not depend on the tokenizer, so the
    test text of a run is the same text here. A model meets the tokens it was trained with, and bits per byte stay
    comparable, because they are per byte of text.

    Raises:
        UserError: for a split that does not exist, and as `prepare` does.
    """
    if split not in (*SPLITS, ALL):
        raise unknown("split", split, (*SPLITS, ALL))
    data = prepare(dataclasses.replace(config, tokenizer="bytes", tokenizer_of=""), progress=progress)
    kept = []
    for name in SPLITS if split == ALL else (split,):
        for document in data.documents(name):
            ids = tokenizer.encode(data.tokenizer.decode(document.tokens[1:]))
            tokens = np.concatenate([[tokenizer.separator], ids])
            kept.append(dataclasses.replace(document, tokens=tokens))
    return DocumentSet(config, split, tuple(kept))
