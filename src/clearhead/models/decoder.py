"""The decoder-only transformer.

    x = embedding(tokens) [+ position]
    x = block(x)                          one block per layer, see layers/block.py
    logits = head(norm(x))                no last norm when norms stand after each sum

Legend: b batch, t tokens, w width, V vocabulary, h query heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.bias import ALiBi
from clearhead.attention.mask import Mask
from clearhead.attention.spec import Selective
from clearhead.init.standard import Draw, draw_parameters, start_plan
from clearhead.layers.geometry import Geometry
from clearhead.layers.norms import make_norm
from clearhead.layers.position.ids import position_ids
from clearhead.layers.position.rope import Rotation
from clearhead.memory.cache import KVCache
from clearhead.models import accounting
from clearhead.models.build import build_block, build_position
from clearhead.models.config import ModelConfig
from clearhead.models.groups import parameter_groups
from clearhead.models.state import DecoderState


class Decoder(nn.Module):
    """A causal language model as `config` describes it; parameters start as `init_parameters(0)` draws them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.position = build_position(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(build_block(config) for _ in range(config.layers))
        pre = config.norm_placement == "pre"
        self.norm = make_norm(config.norm, config.width) if pre else nn.Identity()
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight
        self.init_parameters(0)

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
        state: DecoderState | None = None,
    ) -> Tensor:
        """Return next-token logits [b, t, V], fp32 or better (under autocast the last product is taken in its dtype).

        Args:
            tokens_bt: token ids, integer [b, t].
            segments: [b, t] int; a document is a run of equal numbers, attention stays inside it and positions restart.
            valid: [b, t] bool, False = padding on the left or right of a row. Logits at padding mean nothing.
            state: from `new_state`; these tokens follow those it holds, and are appended. No gradients.

        Raises `ValueError` when shapes, dtypes or lengths do not fit, with what was expected.
        """
        self._check(tokens_bt, segments, valid, state)
        geometry = self._geometry(tokens_bt, segments, valid, state)
        x_btw = self.embedding(tokens_bt)
        if self.position is not None:
            x_btw = x_btw + self.position(geometry.positions).to(x_btw.dtype)
        x_btw = self.dropout(x_btw)
        for layer, block in enumerate(self.blocks):
            x_btw = block(x_btw, geometry, None if state is None else state.caches[layer])
        logits_btV = self.head(self.norm(x_btw))
        return logits_btV.to(torch.promote_types(logits_btV.dtype, torch.float32))

    def _geometry(
        self, tokens_bt: Tensor, segments: Tensor | None, valid: Tensor | None, state: DecoderState | None
    ) -> Geometry:
        config, tokens, device = self.config, tokens_bt.shape[1], tokens_bt.device
        mask = Mask.causal()
        first_b = None
        if valid is not None:
            first_b, end_b = valid_range(valid)
            mask = mask & Mask.key_range(first_b, end_b)
        if segments is not None:
            mask = mask & Mask.segments(segments)
        held_b = None if state is None else state.lengths
        positions = position_ids(tokens, segments_bt=segments, first_b=first_b, offset_b=held_b, device=device)

        visible = None
        if isinstance(config.spec.temperature, Selective):
            seen, keys = mask, tokens
            if state is not None:  # the cache holds a row's tokens without padding: its own first one is slot 0
                seen = Mask.causal(state.lengths if first_b is None else state.lengths - first_b)
                keys = state.capacity
            pattern = Mask(config.spec.pattern.terms(causal=True))
            visible = (seen & pattern).visible_count(tokens, keys, device)
        return Geometry(
            positions=positions,
            mask=mask,
            visible=visible,
            bias=ALiBi(ALiBi.default_slopes(config.heads, device)) if config.position == "alibi" else None,
            rotation=(
                Rotation.at(positions, config.head_size, base=config.rope_base) if config.position == "rope" else None
            ),
        )

    def _check(
        self, tokens_bt: Tensor, segments: Tensor | None, valid: Tensor | None, state: DecoderState | None
    ) -> None:
        if tokens_bt.dim() != 2 or tokens_bt.is_floating_point() or tokens_bt.dtype == torch.bool:
            raise ValueError(
                f"tokens: expected integers [batch, tokens], got {tokens_bt.dtype} {tuple(tokens_bt.shape)}"
            )
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
            raise ValueError(
                "segments with a state: a cache holds one document per row; give each document its own row"
            )
        if self.config.position == "learned" and state is None and shape[1] > self.config.context:
            raise ValueError(
                f"tokens: {shape[1]} of them, but learned positions end at context={self.config.context}; "
                f"cut the input, or use position='rope'"
            )

    def new_state(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> DecoderState:
        """Empty caches for `batch` rows of up to `capacity` tokens.

        dtype: None = what the projections will answer in: the autocast dtype inside autocast, else the parameters' own.
        """
        weight = self.embedding.weight
        device = weight.device if device is None else torch.device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        if self.config.position == "learned" and capacity > self.config.context:
            raise ValueError(
                f"capacity: {capacity} tokens, but learned positions end at context={self.config.context}; "
                f"ask for fewer, or use position='rope'"
            )
        config = self.config
        return DecoderState(
            tuple(
                KVCache.allocate(batch, config.key_value_heads, capacity, config.head_size, dtype=dtype, device=device)
                for _ in range(config.layers)
            )
        )

    def init_parameters(self, seed: int) -> dict[str, Draw]:
        """Draw every parameter anew by the config's scheme, each from its own generator seeded by (seed, name).

        Returns how each parameter was drawn. See `clearhead.init.standard`.
        """
        config = self.config
        plan = start_plan(self, config.init, width=config.width, layers=config.layers)
        draw_parameters(self, plan, seed)
        return plan

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for an optimizer, every parameter in exactly one; see `clearhead.models.groups`."""
        return parameter_groups(self, temperature_lr_scale=self.config.temperature_lr_scale)

    def count_parameters(self) -> dict[str, int]:
        """Parameters by part, and their "total"; a tied output matrix is counted once, as embedding."""
        return accounting.count_parameters(self)

    def flops_per_token(self, context: int) -> float:
        """Forward and backward floating point operations per token; see `clearhead.models.accounting`."""
        return accounting.training_flops_per_token(self, self.config, context)


def is_one_run(valid_bt: Tensor) -> bool:
    """Whether each row's True entries stand together (reads the tensor on the host)."""
    begins = (valid_bt[:, 1:] & ~valid_bt[:, :-1]).sum(dim=1) + valid_bt[:, 0]
    return bool((begins <= 1).all())


def valid_range(valid_bt: Tensor) -> tuple[Tensor, Tensor]:
    """First index and end (exclusive) of each row's run of True, [b] int64; an empty run begins and ends at t."""
    count_b = valid_bt.sum(dim=1)
    first_b = torch.where(count_b > 0, valid_bt.to(torch.int8).argmax(dim=1), valid_bt.shape[1])
    return first_b, first_b + count_b
