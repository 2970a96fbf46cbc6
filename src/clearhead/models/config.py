"""The whole shape of a model in one frozen value. Imports no torch.

A value of `None` means "derived": the field keeps the `None`, so that `dataclasses.replace(config, heads=8)` derives
anew, and the derived number is a property (`key_value_heads`, `head_size`, `hidden_size`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from clearhead.attention.spec import AttentionSpec, Laser
from clearhead.errors import UserError, nearest, unknown

FEED_FORWARDS = ("swiglu", "gelu", "relu")
NORMS = ("layer", "rms")
NORM_PLACEMENTS = ("pre", "post")
POSITIONS = ("none", "learned", "sinusoidal", "rope", "alibi")
OUTPUT_GATES = ("none", "fixed", "head", "element")
INITS = ("standard", "xavier", "small")
TEMPERATURE_GRANULARITIES = ("shared", "head_slice", "head_full")
TEMPERATURE_TARGETS = ("query", "key", "value")
TEMPERATURE_PARTS = ("token+position", "token", "position")
TEMPERATURE_SLOPES = ("sigmoid", "linear")

CHOICES: dict[str, tuple[str, ...]] = {
    "feed_forward": FEED_FORWARDS,
    "norm": NORMS,
    "norm_placement": NORM_PLACEMENTS,
    "position": POSITIONS,
    "output_gate": OUTPUT_GATES,
    "init": INITS,
    "temperature_granularity": TEMPERATURE_GRANULARITIES,
    "temperature_parts": TEMPERATURE_PARTS,
    "temperature_slope": TEMPERATURE_SLOPES,
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Everything that decides a decoder's parameters and its function.

    The `temperature_*` fields describe `selective` (SSA, arXiv 2411.12892) and are read only when `attention` names it;
    `learned` has no options. Raises `UserError` for a value that cannot be built.
    """

    vocab_size: int = 257
    """Number of token ids; the byte tokenizer has 257."""
    context: int = 256
    """Training length in tokens. Learned positions end here; the others run on, untested by training."""
    layers: int = 4
    """Number of blocks."""
    width: int = 128
    """Size of the residual stream."""
    heads: int = 4
    """Number of query heads."""
    kv_heads: int | None = None
    """Number of key and value heads, a divisor of `heads`; None = `heads`."""
    head_dim: int | None = None
    """Size of one head; None = `width // heads`."""
    feed_forward: str = "swiglu"
    """swiglu | gelu | relu."""
    hidden: int | None = None
    """Hidden size of the feed-forward; None = 4 * width, for swiglu 8/3 * width rounded up to a multiple of 8 (three
    matrices instead of two: about the same number of weights)."""
    norm: str = "rms"
    """rms (RMSNorm) | layer (LayerNorm with weight and bias)."""
    norm_placement: str = "pre"
    """pre: x + f(norm(x)), and one norm after the last block | post: norm(x + f(x))."""
    tie_embeddings: bool = True
    """The output matrix is the token embedding."""
    attention: str = "softmax"
    """An attention spec such as softmax, laser, self_adjust+window:64, softmax+selective; kept in canonical form."""
    attention_dropout: float = 0.0
    """Dropout on attention weights (meaningless with laser, which refuses it)."""
    position: str = "rope"
    """none | learned | sinusoidal (both add to the embedding) | rope (turns q and k) | alibi (biases the scores)."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    qk_norm: bool = False
    """RMSNorm over each query and key head, before rotary; the temperatures multiply after it."""
    output_gate: str = "none"
    """A control on the attention output: none | fixed (one learned scalar per head) | head (one value per token and
    head, computed from the layer's input) | element (one per token, head and component). All start as the identity."""
    temperature_granularity: str = "head_slice"
    """How the token part reads its projection: shared (one vector over all heads, one value for all heads) | head_slice
    (a vector per head over that head's slice) | head_full (a vector per head over all heads)."""
    temperature_on: str = "query+value"
    """What gets a temperature: terms out of query, key, value joined by "+". The paper's method is query+value."""
    temperature_parts: str = "token+position"
    """token+position | token | position: tau = 1 + [tanh f(x)] + [slope * ln n]."""
    temperature_slope: str = "sigmoid"
    """sigmoid (slope = sigmoid(alpha), the paper) | linear (slope = beta, beginning at 0: exactly the identity)."""
    temperature_lr_scale: float = 10.0
    """Learning rate of the temperature parameters as a multiple of the others'. With 1 the slope hardly leaves its
    start in a short run: there the sigmoid is flat."""
    dropout: float = 0.0
    """Dropout on the embedding and on what each branch adds to the stream."""
    init: str = "standard"
    """standard (GPT-2) | xavier | small; see clearhead.init.standard."""

    def __post_init__(self) -> None:
        for name in ("vocab_size", "context", "layers", "width", "heads"):
            _check_count(name, getattr(self, name))
        for name in ("kv_heads", "head_dim", "hidden"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(name, str(getattr(self, name)), choices)
        for name in ("tie_embeddings", "qk_norm"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        for name in ("dropout", "attention_dropout"):
            value = _check_number(name, getattr(self, name))
            if not 0.0 <= value < 1.0:
                raise UserError(f"{name}: expected a share in [0, 1), got {value}")
        for name in ("rope_base", "temperature_lr_scale"):
            if _check_number(name, getattr(self, name)) <= 0.0:
                raise UserError(f"{name}: expected a number above 0, got {getattr(self, name)}")
        self._check_sizes()
        object.__setattr__(self, "attention", str(AttentionSpec.parse(str(self.attention))))
        if self.attention_dropout > 0.0 and isinstance(self.spec.read, Laser):
            raise UserError(
                "attention_dropout with laser: a log of randomly dropped exponentials has no stated expectation; "
                "set attention_dropout=0 and use dropout"
            )
        object.__setattr__(self, "temperature_on", _canonical_targets(self.temperature_on))

    def _check_sizes(self) -> None:
        if self.heads % self.key_value_heads:
            raise UserError(
                f"kv_heads: expected a divisor of heads={self.heads}, got {self.key_value_heads}; "
                f"each key head serves heads/kv_heads query heads"
            )
        if self.head_dim is None and self.width % self.heads:
            raise UserError(
                f"width: expected a multiple of heads={self.heads}, got {self.width}; change one or set head_dim"
            )
        if self.position == "rope" and self.head_size % 2:
            raise UserError(f"head_dim: rope turns pairs of components, expected an even size, got {self.head_size}")
        if self.position == "sinusoidal" and self.width % 2:
            raise UserError(
                f"width: sinusoidal positions pair sine with cosine, expected an even width, got {self.width}"
            )

    @cached_property
    def spec(self) -> AttentionSpec:
        """The parsed attention."""
        return AttentionSpec.parse(self.attention)

    @property
    def key_value_heads(self) -> int:
        """`kv_heads`, or `heads`."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def head_size(self) -> int:
        """`head_dim`, or `width // heads`."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def hidden_size(self) -> int:
        """`hidden`, or the default that its docstring states."""
        if self.hidden is not None:
            return self.hidden
        return 8 * math.ceil(self.width / 3) if self.feed_forward == "swiglu" else 4 * self.width

    @property
    def temperature_targets(self) -> tuple[str, ...]:
        """`temperature_on` as a tuple, in the order query, key, value."""
        return tuple(self.temperature_on.split("+"))

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON; `from_dict` brings back an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build from a dict; an unknown key raises `UserError` with the nearest name, a missing one is the default."""
        names = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise UserError(f"unknown model option {key!r}{nearest(str(key), names)}; known: {', '.join(names)}")
        return cls(**values)


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: expected a whole number of at least 1, got {value!r}")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def _canonical_targets(text: str) -> str:
    terms = str(text).split("+")
    for term in terms:
        if term not in TEMPERATURE_TARGETS:
            raise unknown("temperature_on term", term, TEMPERATURE_TARGETS)
    if len(set(terms)) < len(terms):
        raise UserError(f"temperature_on: each of query, key, value at most once, got {text!r}")
    return "+".join(name for name in TEMPERATURE_TARGETS if name in terms)


PRESETS: dict[str, ModelConfig] = {
    # Trains in seconds on one core: for tests and first looks.
    "tiny": ModelConfig(layers=2, width=64, heads=2, context=128),
    # Minutes on one core with bytes: the size for comparisons on a CPU.
    "small": ModelConfig(layers=4, width=128, heads=4, context=256),
    # Hours on a CPU.
    "base": ModelConfig(layers=6, width=256, heads=8, context=512),
    # The shape of GPT-2 124M; wants a GPU.
    "large": ModelConfig(layers=12, width=768, heads=12, context=1024, vocab_size=50257),
}
"""Named sizes; change single fields with `dataclasses.replace(PRESETS["small"], attention="laser")`."""
