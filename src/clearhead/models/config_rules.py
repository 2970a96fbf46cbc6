"""Which configs can be built, and why not the others. Imports no torch.

`check(config)` also puts the texts of attention, memory and temperature_on into canonical form.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from clearhead.attention.spec import AttentionSpec, Full, Laser, Performer
from clearhead.errors import UserError, nearest, unknown
from clearhead.init.deepscale import residual_constants
from clearhead.models.choices import ADMIN, CHOICES, DEEPSCALE, TEMPERATURE_TARGETS

if TYPE_CHECKING:
    from clearhead.models.config import ModelConfig


def check_names(config_class: Any, values: Mapping[str, Any]) -> None:
    """Raise `UserError` with the nearest name for a key that is no field of the model's config."""
    names = [field.name for field in dataclasses.fields(config_class)]
    for key in values:
        if key not in names:
            raise UserError(f"unknown model option {key!r}{nearest(str(key), names)}; known: {', '.join(names)}")


def check(config: ModelConfig) -> None:
    """Raise `UserError` for a config that cannot be built."""
    for name in ("vocab_size", "context", "layers", "width", "heads"):
        _check_count(name, getattr(config, name))
    for name in ("relative_buckets", "relative_max_distance", "fire_hidden", "feedback_window", "feedback_block"):
        _check_count(name, getattr(config, name))
    for name in ("kv_heads", "head_dim", "hidden", "decoder_layers", "xl_width"):
        if getattr(config, name) is not None:
            _check_count(name, getattr(config, name))
    for name, choices in CHOICES.items():
        if getattr(config, name) not in choices:
            raise unknown(name, str(getattr(config, name)), choices)
    for name in (
        "tie_embeddings",
        "qk_norm",
        "embedding_norm",
        "share_embeddings",
        "feedback_share_kv",
        "feedback_carry",
    ):
        derived = name == "embedding_norm" and config.embedding_norm is None
        if not derived and not isinstance(getattr(config, name), bool):
            raise UserError(f"{name}: expected true or false, got {getattr(config, name)!r}")
    for name in ("dropout", "attention_dropout"):
        value = _check_number(name, getattr(config, name))
        if not 0.0 <= value < 1.0:
            raise UserError(f"{name}: expected a share in [0, 1), got {value}")
    for name in ("rope_base", "temperature_lr_scale", "deepscale_k"):
        if _check_number(name, getattr(config, name)) <= 0.0:
            raise UserError(f"{name}: expected a number above 0, got {getattr(config, name)}")
    _check_sizes(config)
    _check_architecture(config)
    _check_init(config)
    object.__setattr__(config, "attention", str(AttentionSpec.parse(str(config.attention))))
    if config.attention_dropout > 0.0 and isinstance(config.spec.read, Laser):
        raise UserError(
            "attention_dropout with laser: a log of randomly dropped exponentials has no stated expectation; "
            "set attention_dropout=0 and use dropout"
        )
    object.__setattr__(config, "temperature_on", canonical_targets(config.temperature_on))
    _check_memory(config)
    if isinstance(config.spec.weights, Performer):
        _check_performer(config)


def _check_sizes(config: ModelConfig) -> None:
    if config.heads % config.key_value_heads:
        raise UserError(
            f"kv_heads: expected a divisor of heads={config.heads}, got {config.key_value_heads}; "
            f"each key head serves heads/kv_heads query heads"
        )
    if config.head_dim is None and config.width % config.heads:
        raise UserError(
            f"width: expected a multiple of heads={config.heads}, got {config.width}; change one or set head_dim"
        )
    if config.position == "rope" and config.head_size % 2:
        raise UserError(f"head_dim: rope turns pairs of components, expected an even size, got {config.head_size}")
    if config.fire_threshold is not None:
        if config.position != "fire":
            raise UserError(f"fire_threshold: only position=fire has a threshold, not {config.position}")
        if _check_number("fire_threshold", config.fire_threshold) <= 0.0:
            raise UserError(f"fire_threshold: expected a length above 0, got {config.fire_threshold}")
    if config.xl_width is not None and config.position != "xl":
        raise UserError(f"xl_width: only position=xl has such a sinusoid, not {config.position}")
    if config.position == "xl" and config.distance_size % 2:
        raise UserError(f"xl_width: sines are paired with cosines, expected an even width, got {config.distance_size}")
    if config.position == "sinusoidal" and config.width % 2:
        raise UserError(
            f"width: sinusoidal positions pair sine with cosine, expected an even width, got {config.width}"
        )


def _check_performer(config: ModelConfig) -> None:
    if config.position in ("alibi", "t5", "kerple", "fire", "xl"):
        raise UserError(
            f"position={config.position} with performer: it adds to scores, and performer never makes a score; take "
            "rope, learned, sinusoidal or none"
        )
    if config.attention_dropout > 0.0:
        raise UserError(
            "attention_dropout with performer: the weights that it would drop are never made; set "
            "attention_dropout=0 and use dropout"
        )
    if config.spec.temperature is not None and config.temperature_targets != ("value",):
        raise UserError(
            f"temperature_on={config.temperature_on} with performer: a temperature on queries or keys does nothing "
            "to ReLU features and multiplies the variance of the others exponentially; set temperature_on=value"
        )


def _check_architecture(config: ModelConfig) -> None:
    if config.decoder_layers is not None and config.architecture != "seq2seq":
        raise UserError(f"decoder_layers: only architecture=seq2seq has two stacks; {config.architecture} takes layers")
    if isinstance(config.segment_types, bool) or not isinstance(config.segment_types, int) or config.segment_types < 0:
        raise UserError(f"segment_types: expected a whole number of at least 0, got {config.segment_types!r}")
    if config.segment_types and config.architecture != "encoder":
        raise UserError(f"segment_types: only architecture=encoder has a segment table, not {config.architecture}")
    if config.position == "relative_key" and config.architecture != "feedback":
        raise UserError(
            f"position=relative_key: only architecture=feedback has a window of keys to add it to, not "
            f"{config.architecture}; take t5, kerple or alibi"
        )
    if config.architecture == "feedback":
        _check_feedback(config)
    elif config.feedback_carry:
        raise UserError(
            f"feedback_carry: only architecture=feedback has such memories, not {config.architecture}; a decoder reads "
            f"a stream with memory=full:512 or the like"
        )
    if config.position == "t5":
        one_way = config.architecture in ("decoder", "feedback")
        side = config.relative_buckets if one_way else config.relative_buckets // 2
        if side < 2 or (not one_way and config.relative_buckets % 2):
            raise UserError(
                f"relative_buckets: expected at least 2 for each direction (an even number where attention looks "
                f"both ways), got {config.relative_buckets}"
            )
        exact = config.relative_buckets // (4 if config.architecture == "encoder" else 2)
        if config.relative_max_distance <= exact:
            raise UserError(
                f"relative_max_distance: must lie above the {exact} distances that have a bucket of their own, "
                f"got {config.relative_max_distance}"
            )


def _check_feedback(config: ModelConfig) -> None:
    pattern = AttentionSpec.parse(str(config.attention)).pattern
    if not isinstance(pattern, Full):
        raise UserError(
            f"attention={config.attention}: architecture=feedback sees a window of memories as it is; leave "
            f"{pattern.name} out and set feedback_window"
        )
    if config.position == "xl":
        raise UserError(
            "position=xl: architecture=feedback places each memory on its own; take relative_key, t5, kerple, alibi or "
            "rope"
        )
    if config.feedback_carry and config.position == "learned":
        raise UserError(
            "position=learned with feedback_carry: a stream has no end, and learned positions do; take relative_key, "
            "rope, alibi, t5 or kerple"
        )
    if config.init in DEEPSCALE + ADMIN:
        raise UserError(
            f"init={config.init}: its constants are derived for layers that attend to their own stack's tokens, and "
            f"architecture=feedback attends to a mixture of layers; take standard, small or xavier"
        )


def _check_memory(config: ModelConfig) -> None:
    if not isinstance(config.memory, str):
        raise UserError(f"memory: expected text such as last:1,long=512,short=64, got {config.memory!r}")
    layout = config.memory_layout
    if layout is None:
        return
    object.__setattr__(config, "memory", str(layout))
    if config.architecture == "feedback":
        raise UserError(
            "memory: architecture=feedback has a memory of its own, of feedback_window tokens; set feedback_carry=true "
            "to keep it from segment to segment"
        )
    if config.architecture != "decoder":
        raise UserError(f"memory: only architecture=decoder reads a stream, not {config.architecture}")
    layout.lengths(config.layers, config.context)
    refused = config.refuses_memory
    if refused is not None:
        raise UserError(f"memory={config.memory}: {refused}")


def _check_init(config: ModelConfig) -> None:
    _check_number("deepscale_alpha", config.deepscale_alpha)
    r0 = config.embedding_correlation
    if r0 is not None and not 0.0 <= _check_number("embedding_correlation", r0) <= 1.0:
        raise UserError(f"embedding_correlation: expected a correlation in [0, 1], got {r0}")
    if config.init in ADMIN and config.norm_placement != "post":
        raise UserError(
            f"init={config.init} weighs the stream that a norm reads after the sum; it needs norm_placement=post "
            f"(for pre-norm take init=deepscale)"
        )
    if config.init in DEEPSCALE:
        for layers, branches in config.depths.values():
            residual_constants(
                layers, config.deepscale_k, config.deepscale_alpha, config.depth_counts, branches=branches
            )
        if config.init == "deepscale" and config.deepscale_constants == "published" and config.feed_forward == "swiglu":
            raise UserError(
                "deepscale_constants=published: DeepScaleLM's code has no gated feed-forward; set "
                "deepscale_constants=exact, or feed_forward=gelu or relu"
            )


def _check_count(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{name}: expected a whole number of at least 1, got {value!r}")


def _check_number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{name}: expected a finite number, got {value!r}")
    return float(value)


def canonical_targets(text: str) -> str:
    """Put `temperature_on` into the order query, key, value; raise `UserError` for another term or one said twice."""
    terms = str(text).split("+")
    for term in terms:
        if term not in TEMPERATURE_TARGETS:
            raise unknown("temperature_on term", term, TEMPERATURE_TARGETS)
    if len(set(terms)) < len(terms):
        raise UserError(f"temperature_on: each of query, key, value at most once, got {text!r}")
    return "+".join(name for name in TEMPERATURE_TARGETS if name in terms)
