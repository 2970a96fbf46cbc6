"""Where the tokens of a call stand and what they see: the `Geometry` of each kind of stack, and the checks before it.

Legend: b batch, t tokens, s tokens of a source.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clearhead.attention.bias import ALiBi, Bias
from clearhead.attention.mask import Mask
from clearhead.attention.spec import Selective
from clearhead.layers.geometry import Geometry
from clearhead.layers.position.ids import position_ids
from clearhead.layers.position.rope import Rotation
from clearhead.layers.position.score import ScorePosition
from clearhead.models.config import ModelConfig
from clearhead.models.state import DecoderState


def causal_geometry(
    config: ModelConfig,
    relative: ScorePosition | None,
    tokens_bt: Tensor,
    segments: Tensor | None,
    valid: Tensor | None,
    state: DecoderState | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Geometry:
    """A decoder's: each token sees its own document up to itself, and what the state holds. dtype: of the angles."""
    tokens, device = tokens_bt.shape[1], tokens_bt.device
    mask, first_b = _within(Mask.causal(), segments, valid)
    held_b = None if state is None else state.lengths
    positions = position_ids(tokens, segments_bt=segments, first_b=first_b, offset_b=held_b, device=device)

    visible = None
    if isinstance(config.spec.temperature, Selective):
        seen, keys = mask, tokens
        if state is not None:  # the cache holds a row's tokens without padding: its own first one is slot 0
            seen = Mask.causal(state.lengths if first_b is None else state.lengths - first_b)
            keys = state.capacity
        visible = config.spec.pattern.within(seen, config.heads, keys).visible_count(tokens, keys, device)
    return Geometry(
        positions=positions,
        mask=mask,
        visible=visible,
        bias=position_bias(config, relative, device),
        rotation=position_rotation(config, positions, dtype),
    )


def bidirectional_geometry(
    config: ModelConfig,
    relative: ScorePosition | None,
    tokens_bt: Tensor,
    segments: Tensor | None,
    valid: Tensor | None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Geometry:
    """An encoder's: each token sees all real tokens of its own document. dtype: of the angles."""
    tokens, device = tokens_bt.shape[1], tokens_bt.device
    mask, first_b = _within(Mask(), segments, valid)
    positions = position_ids(tokens, segments_bt=segments, first_b=first_b, device=device)
    visible = None
    if isinstance(config.spec.temperature, Selective):
        visible = config.spec.pattern.within(mask, config.heads, tokens).visible_count(tokens, tokens, device)
    return Geometry(
        positions=positions,
        mask=mask,
        visible=visible,
        own=visible,
        bias=position_bias(config, relative, device),
        rotation=position_rotation(config, positions, dtype),
    )


def cross_geometry(config: ModelConfig, tokens: int, valid_bs: Tensor | None, device: torch.device) -> Geometry:
    """Cross attention's: every query sees all real tokens of its row's source, which has `tokens` with padding.

    There are no positions: T5's cross attention has none either, and a rotation would compare places in two texts.
    """
    positions = torch.arange(tokens, device=device)[None]
    mask = Mask(offset=0)
    if valid_bs is not None:
        mask = mask & Mask.key_range(*valid_range(valid_bs))
    count = None
    if isinstance(config.spec.temperature, Selective):
        if valid_bs is None:
            count = torch.full((1, 1, 1), tokens, device=device)
        else:
            count = valid_bs.sum(dim=1)[:, None, None]
    return Geometry(positions=positions, mask=mask, visible=count, own=count)


def check_inputs(
    config: ModelConfig,
    tokens_bt: Tensor,
    segments: Tensor | None,
    valid: Tensor | None,
    state: object | None = None,
) -> None:
    """Raise `ValueError` when shapes, dtypes or lengths do not fit, with what was expected."""
    if tokens_bt.dim() != 2 or tokens_bt.is_floating_point() or tokens_bt.dtype == torch.bool:
        raise ValueError(f"tokens: expected integers [batch, tokens], got {tokens_bt.dtype} {tuple(tokens_bt.shape)}")
    shape = tuple(tokens_bt.shape)
    if segments is not None and (segments.shape != tokens_bt.shape or segments.is_floating_point()):
        raise ValueError(f"segments: expected integers {shape}, got {segments.dtype} {tuple(segments.shape)}")
    if valid is not None:
        if valid.shape != tokens_bt.shape or valid.dtype != torch.bool:
            raise ValueError(
                f"valid: expected bool {shape}, True = a real token, got {valid.dtype} {tuple(valid.shape)}"
            )
        if not torch.compiler.is_compiling() and not is_one_run(valid):
            raise ValueError(
                "valid: the real tokens of a row must stand together; expected padding only on its left and right"
            )
    if state is not None and segments is not None:
        raise ValueError("segments with a state: a cache holds one document per row; give each document its own row")
    if config.position == "learned" and state is None and shape[1] > config.context:
        raise ValueError(
            f"tokens: {shape[1]} of them, but learned positions end at context={config.context}; "
            f"cut the input, or use position='rope'"
        )


def is_one_run(valid_bt: Tensor) -> bool:
    """Whether each row's True entries stand together (reads the tensor on the host)."""
    begins = (valid_bt[:, 1:] & ~valid_bt[:, :-1]).sum(dim=1) + valid_bt[:, 0]
    return bool((begins <= 1).all())


def valid_range(valid_bt: Tensor) -> tuple[Tensor, Tensor]:
    """First index and end (exclusive) of each row's run of True, [b] int64; an empty run begins and ends at t."""
    count_b = valid_bt.sum(dim=1)
    first_b = torch.where(count_b > 0, valid_bt.to(torch.int8).argmax(dim=1), valid_bt.shape[1])
    return first_b, first_b + count_b


def _within(mask: Mask, segments: Tensor | None, valid: Tensor | None) -> tuple[Mask, Tensor | None]:
    """The mask inside documents and real tokens, and each row's first real token."""
    first_b = None
    if valid is not None:
        first_b, end_b = valid_range(valid)
        mask = mask & Mask.key_range(first_b, end_b)
    if segments is not None:
        mask = mask & Mask.segments(segments)
    return mask, first_b


def position_bias(config: ModelConfig, relative: ScorePosition | None, device: torch.device) -> Bias | None:
    """What the config's position adds to scores: a learned one (T5, Kerple, FIRE) or ALiBi's slopes."""
    if relative is not None:
        return relative()
    return ALiBi(ALiBi.default_slopes(config.heads, device)) if config.position == "alibi" else None


def position_rotation(config: ModelConfig, positions: Tensor, dtype: torch.dtype = torch.float32) -> Rotation | None:
    """The angles of positions [1|b, t], for rotary and for Transformer-XL's positions."""
    if config.position == "rope":
        return Rotation.at(positions, config.head_size, base=config.rope_base, dtype=dtype)
    return Rotation.at(positions, config.distance_size, dtype=dtype) if config.position == "xl" else None
