"""What text a run reads and how it is cut: `DataConfig`, importable without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from clearhead.data.alphabets import ALPHABETS
from clearhead.errors import UserError, unknown

if TYPE_CHECKING:
    from clearhead.data.synthetic.task import Synthetic

TokenizerName = Literal["bytes", "bpe", "dna", "dna3", "dna6", "protein", "pretrained"]

BYTE_VOCABULARY = 257
SYNTHETIC = "synthetic:"
"""How the name of generated data begins; what follows is read by `data/synthetic/catalogue.py`."""
SMALLEST_BPE = 258  # 256 bytes, one merge, one separator


@dataclass(frozen=True)
class DataConfig:
    """The text of a run. Everything that decides which token stands where is in here.

    The split depends on `source`, the two fractions, `split_seed` and `max_bytes` alone: two runs that differ
    in the tokenizer or the context still share their test text.
    """

    source: str = "shakespeare"
    """A name from `clearhead data list`, or a path: a .txt or .jsonl file (key "text") or sequences (.fna, .fa,
    .faa), plain or .gz, or a folder of such files. synthetic:NAME,option=value draws a task instead of reading text."""

    tokenizer: TokenizerName = "bytes"
    """bytes: one token per UTF-8 byte. bpe: frequent byte pairs merged, learned from the training split. dna | dna3 |
    dna6: a token for every base, or every three or six. protein: a token for every amino acid. pretrained: the
    tokenizer of the model that `tokenizer_of` names."""

    tokenizer_of: str = ""
    """pretrained only: the model whose tokenizer.json is read, a name such as smollm2 or a Hugging Face folder."""

    vocab_size: int = 4096
    """Size of the BPE vocabulary, separator included (bytes always have 257: 256 and the separator). pretrained: the
    ids that the model's tokenizer has."""

    context: int = 256
    """Tokens in one training window, and the longest context in evaluation."""

    val_fraction: float = 0.1
    """Share of the bytes that goes to validation."""

    test_fraction: float = 0.1
    """Share of the bytes that goes to the test split."""

    split_seed: int = 0
    """Shuffles the documents before they are dealt to the splits."""

    max_bytes: int | None = None
    """Use at most this much text. Every split shrinks in proportion, so a smaller run's test text is part of
    a larger run's."""

    def __post_init__(self) -> None:
        self._check_types()
        if not self.source.strip():
            raise UserError("data.source is empty; give a name from `clearhead data list` or a path")
        if self.tokenizer not in get_args(TokenizerName):
            raise unknown("tokenizer", self.tokenizer, get_args(TokenizerName))
        if self.tokenizer == "bpe" and self.vocab_size < SMALLEST_BPE:
            raise UserError(f"data.vocab_size must be at least {SMALLEST_BPE} for bpe, got {self.vocab_size}")
        if (self.tokenizer == "pretrained") != bool(self.tokenizer_of.strip()):
            raise UserError(
                f"data.tokenizer=pretrained and data.tokenizer_of belong together, got {self.tokenizer!r} and "
                f"{self.tokenizer_of!r}; name the model whose tokenizer is meant, or leave tokenizer_of empty"
            )
        if self.context < 1:
            raise UserError(f"data.context must be at least 1, got {self.context}")
        if self.synthetic is not None:
            self._check_synthetic(self.synthetic)
        for key in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, key) < 1:
                raise UserError(f"data.{key} must lie between 0 and 1, got {getattr(self, key)}")
        if self.val_fraction + self.test_fraction >= 0.9:
            total = self.val_fraction + self.test_fraction
            raise UserError(f"data.val_fraction + data.test_fraction must stay below 0.9, got {total:g}")
        if self.split_seed < 0:
            raise UserError(f"data.split_seed must not be negative, got {self.split_seed}")
        if self.max_bytes is not None and self.max_bytes < 1:
            raise UserError(f"data.max_bytes must be positive or left out, got {self.max_bytes}")

    def _check_synthetic(self, task: Synthetic) -> None:
        task.check_context(self.context)
        if self.tokenizer != "bytes" or self.max_bytes is not None:
            raise UserError(
                f"data.source={self.source} has symbols of its own and no end; leave data.tokenizer and data.max_bytes "
                f"out"
            )

    def _check_types(self) -> None:
        """Refuse values of another type, which a hand-written JSON file can hold (`"256"`, `true`)."""
        kinds: dict[str, tuple[type, ...]] = dict.fromkeys(("source", "tokenizer", "tokenizer_of"), (str,))
        kinds |= dict.fromkeys(("val_fraction", "test_fraction"), (int, float))
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name == "max_bytes" and value is None:
                continue
            wanted = kinds.get(field.name, (int,))
            if not isinstance(value, wanted) or isinstance(value, bool):
                names = " or ".join(kind.__name__ for kind in wanted)
                raise UserError(f"data.{field.name} must be {names}, got {value!r} ({type(value).__name__})")

    @property
    def ids(self) -> int:
        """Ids of the tokenizer, the separator included."""
        if self.synthetic is not None:
            return len(self.synthetic.symbols) + 1
        if self.tokenizer in ALPHABETS:
            return ALPHABETS[self.tokenizer].vocab_size
        return self.vocab_size if self.tokenizer in ("bpe", "pretrained") else BYTE_VOCABULARY

    @property
    def synthetic(self) -> Synthetic | None:
        """The task that draws the data, when `source` names one; None when it is text."""
        if not self.source.startswith(SYNTHETIC):
            return None
        from clearhead.data.synthetic.catalogue import parse

        return parse(self.source)

    def to_dict(self) -> dict[str, Any]:
        """Return the plain values; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DataConfig:
        """Build from plain values; an unknown key raises `UserError` with the nearest known one."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise unknown("key in data", key, known)
        return cls(**values)
