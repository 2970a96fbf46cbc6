"""The tokenizer of a pretrained model, as its folder's tokenizer.json describes it. Needs `tokenizers`, nothing else.

The document separator is one of the model's own special tokens, because that is what it met between documents when it
was pretrained: `<|endoftext|>` where there is one, else the tokenizer's beginning, else its end of a text. (A model
that was tuned for chat often calls the mark of a turn its beginning; its pretraining did not.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clearhead.data.tokenizer import Tokenizer, Tokens, text_chunks
from clearhead.errors import UserError

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
END_OF_TEXT = "<|endoftext|>"


class PretrainedTokenizer(Tokenizer):
    """A tokenizer of Hugging Face's `tokenizers`, with `separator` one of its own ids.

    Special tokens stand for themselves only: a text that spells one out is read as ordinary characters.
    """

    kind = "pretrained"

    def __init__(self, state: str, separator: int) -> None:
        from tokenizers import Tokenizer as Library

        self._library = Library.from_str(state)
        self._library.encode_special_tokens = True
        self._library.no_padding()
        self._library.no_truncation()
        # The largest id, not the number of ids: a vocabulary may have gaps.
        self.vocab_size = 1 + max(self._library.get_vocab(with_added_tokens=True).values())
        self._separator = separator
        self._state = state

    @property
    def separator(self) -> int:
        """Return the id that stands before every document."""
        return self._separator

    @classmethod
    def of_model(cls, source: str) -> PretrainedTokenizer:
        """Read the tokenizer of a model, named or by its folder. Raises `UserError` when there is none."""
        from clearhead.data.pretrained_folder import pretrained_folder

        folder = pretrained_folder(source)
        try:
            state = (folder / FILE).read_text(encoding="utf-8")
            values = json.loads(state)
        except FileNotFoundError:
            raise UserError(
                f"{source}: the folder has no {FILE}; save it with AutoTokenizer.from_pretrained(...).save_pretrained"
                f"({str(folder)!r})"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / FILE} cannot be read ({' '.join(str(error).split())})") from None
        try:
            return cls(state, _separator_of(folder, values))
        except UserError:
            raise
        except Exception as error:  # the library raises bare Exception for a state that it cannot read
            raise UserError(f"{folder / FILE} is no tokenizer: {' '.join(str(error).split())[:200]}") from None

    def encode(self, text: str) -> Tokens:
        """Return the tokens of `text`; nothing is added before or after it."""
        parts = [self._library.encode(chunk, add_special_tokens=False).ids for chunk in text_chunks(text)]
        return np.concatenate([np.asarray(part, dtype=np.int64) for part in parts] or [np.zeros(0, np.int64)])

    def decode(self, ids: Sequence[int] | npt.NDArray[Any], *, separator: str = "") -> str:
        """Return the text of the tokens."""
        parts = self._split_at_separators(ids)
        return separator.join(self._library.decode(part.tolist(), skip_special_tokens=False) for part in parts)

    def to_dict(self) -> dict[str, Any]:
        """Return the kind, the separator and the library's own JSON."""
        return {"kind": self.kind, "separator": self._separator, "tokenizer": json.loads(self._state)}


def _separator_of(folder: Path, state: Mapping[str, Any]) -> int:
    """The id of the separator; see the top of the file."""
    ids = {token["content"]: int(token["id"]) for token in state.get("added_tokens") or []}
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    named = [config.get("bos_token"), config.get("eos_token")]
    for token in (END_OF_TEXT, *named):
        content = token.get("content") if isinstance(token, dict) else token
        if content in ids:
            return ids[content]
    raise UserError(
        f"{folder}: the tokenizer has no token to put between documents (looked for {END_OF_TEXT} among the special "
        f"tokens of {FILE}, and for bos_token and eos_token of {CONFIG}); set one of them and save the tokenizer again"
    )
