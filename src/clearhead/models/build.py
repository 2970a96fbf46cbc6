"""From a `ModelConfig` to layers: the one place that knows which field goes where."""

from __future__ import annotations

from clearhead.attention.spec import Learned, Selective
from clearhead.layers.attention import Attention
from clearhead.layers.block import Block, Residual
from clearhead.layers.feed_forward import make_feed_forward
from clearhead.layers.gate import make_gate
from clearhead.layers.norms import make_norm
from clearhead.layers.position.learned import LearnedPosition
from clearhead.layers.position.sinusoidal import SinusoidalPosition
from clearhead.layers.residual import make_residual
from clearhead.layers.temperature import LearnedTemperatures, SelectiveTemperatures
from clearhead.models.config import ModelConfig


def build_block(config: ModelConfig) -> Block:
    """One block as `config` describes it."""
    attention = Attention(
        config.width,
        config.heads,
        config.key_value_heads,
        config.head_size,
        spec=config.spec,
        qk_norm=config.qk_norm,
        temperatures=build_temperatures(config),
        gate=make_gate(config.output_gate, config.width, config.heads, config.head_size),
        dropout=config.attention_dropout,
    )

    def residual() -> Residual:
        return make_residual(config.norm_placement, make_norm(config.norm, config.width), dropout=config.dropout)

    return Block(
        attention,
        make_feed_forward(config.feed_forward, config.width, config.hidden_size),
        attention_residual=residual(),
        feed_forward_residual=residual(),
    )


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
    """What is added to the embedding; rotary and ALiBi act inside attention instead."""
    if config.position == "learned":
        return LearnedPosition(config.context, config.width)
    if config.position == "sinusoidal":
        return SinusoidalPosition(config.width)
    return None
