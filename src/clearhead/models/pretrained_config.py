"""A pretrained causal language model of Hugging Face, and what is trained of it, in one frozen value. Imports no torch.

It stands where a `ModelConfig` stands in a run's configuration, so that one trainer and one comparison serve both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from clearhead.attention.spec import AttentionSpec
from clearhead.errors import UserError, unknown
from clearhead.models.choices import TEMPERATURE_GRANULARITIES, TEMPERATURE_PARTS, TEMPERATURE_SLOPES
from clearhead.models.config_rules import canonical_targets, check_names

ARCHITECTURE = "pretrained"
TUNES = ("lora", "temperature", "full")
DTYPES = ("fp32", "bf16")
PEFT_DEFAULT, ALL_LINEAR = "default", "all-linear"


@dataclass(frozen=True, kw_only=True)
class PretrainedConfig:
    """Which model, with which attention, and which of its parameters learn.

    The temperatures that `attention` names always learn; they begin as the identity, so before the first step the
    model is the pretrained one. Raises `UserError` for a value that makes no sense.
    """

    architecture: str = ARCHITECTURE
    """pretrained; says in a stored config which kind it is."""
    source: str
    """A name such as smollm2 (`clearhead data list`), or a folder that `save_pretrained` wrote."""
    base: str = ""
    """Fingerprint of the pretrained weights, checked when they are read; empty = any. `of` fills it in."""
    vocab_size: int = 0
    """Ids that the model knows."""
    context: int = 256
    """Training length in tokens, at most the model's positions."""
    attention: str = "softmax"
    """An attention spec such as softmax, softmax+selective, laser; kept in canonical form."""
    tune: str = "lora"
    """What learns beside the temperatures: lora (small matrices beside the model's own, by peft) | temperature (nothing
    else) | full (every parameter)."""
    lora_rank: int = 8
    """lora: inner size of each pair of matrices."""
    lora_alpha: float = 16.0
    """lora: what they compute is multiplied by lora_alpha / lora_rank."""
    lora_dropout: float = 0.0
    """lora: dropout on what they read."""
    lora_targets: str = PEFT_DEFAULT
    """lora: default (what peft takes for this kind of model, usually queries and values) | all-linear | names of
    modules joined by commas, such as q_proj,k_proj,v_proj,o_proj."""
    weights: str = "fp32"
    """Type in which the pretrained weights are held: fp32 | bf16 (half the memory; not with tune=full, whose small
    steps bf16 would swallow). What learns is fp32 always."""
    gradient_checkpointing: bool = False
    """Make each block's activations again in the backward pass: less memory, about a third more time."""
    temperature_granularity: str = "head_slice"
    """selective: shared | head_slice | head_full; see `ModelConfig`."""
    temperature_on: str = "query+value"
    """selective: what gets a temperature, query+value, query or value."""
    temperature_parts: str = "token+position"
    """selective: token+position | token | position."""
    temperature_slope: str = "linear"
    """selective: linear (begins as exactly the identity) | sigmoid (the paper's; begins a little off it)."""
    temperature_lr_scale: float = 10.0
    """Learning rate of the temperatures as a multiple of the others'."""

    def __post_init__(self) -> None:
        if self.architecture != ARCHITECTURE:
            raise UserError(f"model.architecture: a pretrained model's is {ARCHITECTURE!r}, got {self.architecture!r}")
        for name in ("source", "base"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"model.{name}: expected a text, got {getattr(self, name)!r}")
        if not self.source.strip():
            raise UserError("model.source is empty; give a name such as smollm2, or a Hugging Face folder")
        for name, least in (("vocab_size", 0), ("context", 1), ("lora_rank", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UserError(f"model.{name}: expected a whole number of at least {least}, got {value!r}")
        for name in ("lora_alpha", "temperature_lr_scale"):
            if _number(name, getattr(self, name)) <= 0:
                raise UserError(f"model.{name}: expected a number above 0, got {getattr(self, name)}")
        if not 0 <= _number("lora_dropout", self.lora_dropout) < 1:
            raise UserError(f"model.lora_dropout: expected a share in [0, 1), got {self.lora_dropout}")
        if not isinstance(self.gradient_checkpointing, bool):
            raise UserError(
                f"model.gradient_checkpointing: expected true or false, got {self.gradient_checkpointing!r}"
            )
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise unknown(f"model.{name}", str(getattr(self, name)), choices)
        object.__setattr__(self, "attention", str(AttentionSpec.parse(str(self.attention))))
        object.__setattr__(self, "temperature_on", canonical_targets(self.temperature_on))
        if "key" in self.temperature_targets:
            raise UserError("model.temperature_on: a pretrained model's keys get none; take query, value or both")
        if self.tune == "temperature" and self.spec.temperature is None:
            raise UserError(
                f"model.tune=temperature: attention={self.attention} has no temperature, so nothing would learn; add "
                f"+selective or +learned, or take tune=lora"
            )
        if self.tune == "full" and self.weights != "fp32":
            raise UserError(
                "model.weights=bf16 with tune=full: small steps would be rounded away; take weights=fp32 (with "
                "train.precision=bf16 the products are bf16 all the same)"
            )
        if not all(part.strip() for part in self.lora_targets.split(",")):
            raise UserError(
                f"model.lora_targets: expected {PEFT_DEFAULT}, {ALL_LINEAR} or names joined by commas, got "
                f"{self.lora_targets!r}"
            )

    @classmethod
    def of(cls, source: str, **options: Any) -> Self:
        """Return the config of a model on disk: its vocabulary and fingerprint are read from its folder.

        Raises `UserError`, in one line, for a name that is unknown or not fetched, a folder without a causal language
        model, and a context longer than the model's positions.
        """
        from clearhead.data import pretrained_folder as disk

        folder = disk.pretrained_folder(source)
        values = disk.read_causal_config(folder)
        name = str(folder) if source != str(folder) and _is_path(source) else source
        vocabulary = disk.text_value(values, "vocab_size")
        config = cls(source=name, base=disk.weights_fingerprint(folder), vocab_size=int(vocabulary or 0), **options)
        config.check_context(disk.text_value(values, *disk.POSITION_KEYS))
        return config

    def check_context(self, positions: int | None) -> None:
        """Raise `UserError` when the context is longer than the model's positions; None = it has no limit."""
        if positions is not None and self.context > positions:
            raise UserError(
                f"model.context={self.context} is longer than the {positions} positions of {self.source}; lower "
                f"--context"
            )

    # What the trainer asks of every model's config.
    memory = ""
    feedback_carry = False

    @cached_property
    def spec(self) -> AttentionSpec:
        """The parsed attention."""
        return AttentionSpec.parse(self.attention)

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
        check_names(cls, values)
        if "source" not in values:
            raise UserError("model.source is missing: which pretrained model is it?")
        return cls(**values)


_CHOICES: dict[str, tuple[str, ...]] = {
    "tune": TUNES,
    "weights": DTYPES,
    "temperature_granularity": TEMPERATURE_GRANULARITIES,
    "temperature_parts": TEMPERATURE_PARTS,
    "temperature_slope": TEMPERATURE_SLOPES,
}


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"model.{name}: expected a number, got {value!r}")
    return float(value)


def _is_path(source: str) -> bool:
    from pathlib import Path

    return Path(source).expanduser().is_dir()
