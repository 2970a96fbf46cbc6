"""What every model is made of: token embedding, blocks, last norm, and the matrix to logits where there is one.

    x = embedding(tokens) [+ position] [+ segment]      [norm], dropout
    x = block(x)                                        one block per layer, see layers/block.py
    logits = head(norm(x))                              no last norm when norms stand after each sum

Legend: b batch, t tokens, s tokens of a source, w width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.attend import State
from clearhead.attention.spec import Performer
from clearhead.init.standard import Draw
from clearhead.init.start import start_parameters
from clearhead.layers.cross_attention import Cross
from clearhead.layers.geometry import Geometry
from clearhead.layers.norms import make_norm
from clearhead.layers.performer import PerformerFeatures
from clearhead.memory.cache import KVCache
from clearhead.memory.performer import Cache, PerformerState
from clearhead.models import accounting
from clearhead.models.build import build_block, build_embedding_norm, build_head_scale, build_position, build_relative
from clearhead.models.config import ModelConfig
from clearhead.models.groups import parameter_groups


class Model(nn.Module):
    """What every architecture offers to training: its config, its start, optimizer groups and counts."""

    config: ModelConfig

    def init_parameters(self, seed: int) -> dict[str, Draw]:
        """Draw every parameter anew by the config's scheme, each from its own generator seeded by (seed, name).

        Returns how each parameter was drawn; see `clearhead.init.start`.
        """
        return start_parameters(self, self.config, seed)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups for an optimizer, every parameter in exactly one; see `clearhead.models.groups`."""
        return parameter_groups(self, temperature_lr_scale=self.config.temperature_lr_scale)

    def count_parameters(self) -> dict[str, int]:
        """Parameters by part, and their "total"; a tied output matrix is counted once, as embedding."""
        return accounting.count_parameters(self)

    def flops_per_token(self, context: int) -> float:
        """Forward and backward floating point operations per token; see `clearhead.models.accounting`."""
        return accounting.training_flops_per_token(self, self.config, context)


class Stack(Model):
    """One stack of blocks. `bidirectional` decides the shape of T5's table alone: what is seen is the geometry's."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        layers: int,
        bidirectional: bool = False,
        cross: bool = False,
        head: bool = True,
        embedding: nn.Embedding | None = None,
        make_block: Callable[..., nn.Module] = build_block,
    ) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width) if embedding is None else embedding
        self.position = build_position(config)
        self.segment = nn.Embedding(config.segment_types, config.width) if config.segment_types else None
        self.relative = build_relative(config, bidirectional=bidirectional)
        self.embedding_norm = build_embedding_norm(config)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(make_block(config, cross=cross) for _ in range(layers))
        for place, features in enumerate(m for m in self.blocks.modules() if isinstance(m, PerformerFeatures)):
            features.start(place)
        pre = config.norm_placement == "pre"
        self.norm = make_norm(config.norm, config.width) if pre else nn.Identity()
        self.head_scale = build_head_scale(config) if head else None
        self.head = nn.Linear(config.width, config.vocab_size, bias=False) if head else None
        if self.head is not None and config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def embed(self, tokens_bt: Tensor, geometry: Geometry, segment_types: Tensor | None = None) -> Tensor:
        """The first stream, [b, t, w]. Without `segment_types` every token is of type 0."""
        x_btw = self.embedding(tokens_bt)
        if self.position is not None:
            x_btw = x_btw + self.position(geometry.positions).to(x_btw.dtype)
        if self.segment is not None:
            x_btw = x_btw + self.segment(torch.zeros_like(tokens_bt) if segment_types is None else segment_types)
        return self.dropout(self.embedding_norm(x_btw))

    def transform(
        self,
        x_btw: Tensor,
        geometry: Geometry | Sequence[Geometry],
        caches: Sequence[State] | None = None,
        states_bsw: Tensor | None = None,
        crosses: Sequence[Cross] | None = None,
        past: Sequence[Tensor | None] | None = None,
        inputs: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the blocks and the last norm, [b, t, w].

        geometry: one for all layers, or one each. past: of each layer, earlier inputs that it looks back on.
        inputs: gets the input of each layer.
        """
        for layer, block in enumerate(self.blocks):
            if inputs is not None:
                inputs.append(x_btw)
            x_btw = block(
                x_btw,
                geometry if isinstance(geometry, Geometry) else geometry[layer],
                None if caches is None else caches[layer],
                states_bsw,
                None if crosses is None else crosses[layer],
                None if past is None else past[layer],
            )
        return self.norm(x_btw)

    @property
    def angle_dtype(self) -> torch.dtype:
        """Of the angles of positions: fp32, or the weights' own where that is better."""
        return torch.promote_types(self.embedding.weight.dtype, torch.float32)

    def logits(self, x_btw: Tensor) -> Tensor:
        """[b, t, V], fp32 or better (under autocast the product is taken in its dtype)."""
        assert self.head is not None
        assert self.head_scale is not None
        logits_btV = self.head(self.head_scale(x_btw))
        return logits_btV.to(torch.promote_types(logits_btV.dtype, torch.float32))

    def new_caches(self, batch: int, capacity: int, dtype: torch.dtype | None, device: Any) -> tuple[Cache, ...]:
        """An empty cache for each block, or a performer's sums; see `Decoder.new_state`."""
        config, weight = self.config, self.embedding.weight
        device = weight.device if device is None else torch.device(device)
        if dtype is None:
            autocast = torch.is_autocast_enabled(device.type)
            dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        if config.position == "learned" and capacity > config.context:
            raise ValueError(
                f"capacity: {capacity} tokens, but learned positions end at context={config.context}; "
                f"ask for fewer, or use position='rope'"
            )
        weights = config.spec.weights
        if isinstance(weights, Performer):
            if not weights.rows_sum_to_one:
                dtype = torch.float64  # sums with signs nearly cancel
            return tuple(
                PerformerState.allocate(
                    batch, config.key_value_heads, weights.width, config.head_size, dtype=dtype, device=device
                )
                for _ in self.blocks
            )
        return tuple(
            KVCache.allocate(
                batch,
                config.key_value_heads,
                capacity,
                config.key_size,
                value_dim=config.head_size,
                dtype=dtype,
                device=device,
            )
            for _ in self.blocks
        )
