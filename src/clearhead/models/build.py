"""From a `ModelConfig` to layers: the one place that knows which field goes where."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import torch.nn as nn

from clearhead.attention.spec import Full, Learned, Performer, Selective
from clearhead.init.admin_omega import constant_omega
from clearhead.init.deepscale import embedding_std, logit_multiplier, residual_constants
from clearhead.layers.attention import Attention
from clearhead.layers.block import Block, Residual
from clearhead.layers.cross_attention import CrossAttention
from clearhead.layers.feed_forward import make_feed_forward
from clearhead.layers.feedback import FeedbackAttention, FeedbackBlock
from clearhead.layers.gate import make_gate
from clearhead.layers.norms import make_norm
from clearhead.layers.performer import PerformerFeatures
from clearhead.layers.position.fire import FirePosition
from clearhead.layers.position.kerple import KerplePosition
from clearhead.layers.position.learned import LearnedPosition
from clearhead.layers.position.score import ScorePosition
from clearhead.layers.position.sinusoidal import SinusoidalPosition
from clearhead.layers.position.t5 import RelativePosition
from clearhead.layers.position.transformer_xl import RelativeXL
from clearhead.layers.residual import ConstantOmegaSum, OmegaSum, PlainSum, ProfiledOmegaSum, ScaledSum, make_residual
from clearhead.layers.scale import Scale
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures
from clearhead.models.choices import DEEPSCALE
from clearhead.models.config import ModelConfig

A = TypeVar("A", bound=Attention)


def build_block(config: ModelConfig, *, cross: bool = False) -> Block:
    """One block as `config` describes it; `cross` = with cross attention."""

    def residual() -> Residual:
        norm, rule = make_norm(config.norm, config.width), build_rule(config, cross=cross)
        return make_residual(config.norm_placement, norm, rule=rule, dropout=config.dropout)

    return Block(
        build_attention(Attention, config),
        make_feed_forward(config.feed_forward, config.width, config.hidden_size),
        attention_residual=residual(),
        feed_forward_residual=residual(),
        cross_attention=build_attention(CrossAttention, config) if cross else None,
        cross_attention_residual=residual() if cross else None,
    )


def build_feedback_block(config: ModelConfig, *, cross: bool = False) -> FeedbackBlock:
    """One block of a Feedback Transformer, with matrices of its own for keys and values; it has no cross attention."""

    def residual() -> Residual:
        norm, rule = make_norm(config.norm, config.width), build_rule(config)
        return make_residual(config.norm_placement, norm, rule=rule, dropout=config.dropout)

    return FeedbackBlock(
        build_attention(FeedbackAttention, config),
        make_feed_forward(config.feed_forward, config.width, config.hidden_size),
        attention_residual=residual(),
        feed_forward_residual=residual(),
    )


def build_attention(kind: type[A], config: ModelConfig) -> A:
    """The attention of a block. Cross attention takes every choice of the spec but its pattern."""
    spec = dataclasses.replace(config.spec, pattern=Full()) if kind is CrossAttention else config.spec
    placed = config.position == "xl" and kind is not CrossAttention
    return kind(
        config.width,
        config.heads,
        config.key_value_heads,
        config.head_size,
        spec=spec,
        qk_norm=config.qk_norm,
        temperatures=build_temperatures(config),
        gate=make_gate(config.output_gate, config.width, config.heads, config.head_size),
        dropout=config.attention_dropout,
        features=PerformerFeatures(spec.weights, config.head_size) if isinstance(spec.weights, Performer) else None,
        relative=RelativeXL(config.heads, config.head_size, config.distance_size) if placed else None,
    )


def build_rule(config: ModelConfig, *, cross: bool = False) -> nn.Module:
    """How a residual sum is taken, as the config's initialisation asks; a new module for each sum.

    cross: the sum stands in a decoder that reads an encoder; a seq2seq model's other sums are its encoder's.
    """
    stack = "decoder" if cross else {"seq2seq": "encoder"}.get(config.architecture, config.architecture)
    layers, _ = config.depths[stack]
    branches = 3 if cross else 2
    if config.init in DEEPSCALE:
        constants = residual_constants(
            layers, config.deepscale_k, config.deepscale_alpha, config.depth_counts, branches=branches
        )
        return ScaledSum(constants.stream_scale, constants.branch_scale)
    if config.init == "admin":
        return ProfiledOmegaSum(config.width)
    if config.init == "admin_constant":
        omega = constant_omega(layers * branches, config.output_change)
        return OmegaSum(config.width, omega) if config.omega_form == "vector" else ConstantOmegaSum(omega)
    return PlainSum()


def build_embedding_norm(config: ModelConfig) -> nn.Module:
    """The norm on the embedding, before its dropout, or the identity."""
    return make_norm(config.norm, config.width) if config.norms_embedding else nn.Identity()


def build_head_scale(config: ModelConfig) -> nn.Module:
    """What the normed state passes on its way to the head.

    deepscale with a tied output matrix: 1 / sqrt(width * variance of the table), for logits of variance 1.
    """
    if config.init in DEEPSCALE and config.tie_embeddings:
        table_std = embedding_std(config.dropout, config.embedding_tables)
        return Scale(logit_multiplier(config.width, table_std**2))
    return nn.Identity()


def build_temperatures(config: ModelConfig) -> SelectiveTemperatures | LearnedTemperatures | None:
    """The temperatures that the attention spec names."""
    temperature = config.spec.temperature
    if temperature is None:
        return None
    if isinstance(temperature, Selective):
        return SelectiveTemperatures(
            config.heads,
            config.key_value_heads,
            config.head_size,
            on=config.temperature_targets,
            granularity=config.temperature_granularity,
            parts=config.temperature_parts,
            slope=config.temperature_slope,
        )
    if isinstance(temperature, Learned):
        return LearnedTemperatures(config.heads)
    raise NotImplementedError(f"no layer makes the temperatures of {temperature}; add it here")


def build_position(config: ModelConfig) -> LearnedPosition | SinusoidalPosition | None:
    """What is added to the embedding; the others act inside attention instead."""
    if config.position == "learned":
        return LearnedPosition(config.context, config.width)
    if config.position == "sinusoidal":
        if config.init in DEEPSCALE:  # a table like the others, though its values are fixed
            return SinusoidalPosition(config.width, rms=embedding_std(config.dropout, config.embedding_tables))
        return SinusoidalPosition(config.width)
    return None


def build_relative(config: ModelConfig, *, bidirectional: bool) -> ScorePosition | None:
    """What learns positions on the scores, one for all blocks of a stack."""
    if config.position == "t5":
        return RelativePosition(
            config.heads, config.relative_buckets, config.relative_max_distance, bidirectional=bidirectional
        )
    if config.position == "kerple":
        return KerplePosition(config.heads, config.kerple_form)
    if config.position == "fire":
        return FirePosition(config.heads, config.fire_hidden, config.fire_start)
    return None
