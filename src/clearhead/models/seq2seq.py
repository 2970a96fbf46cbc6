"""The encoder-decoder: an encoder reads the source, a decoder writes the target and looks at the source.

    states = encoder(source)                          every source token sees all others
    logits = decoder(tokens, states)                  self-attention, cross attention, feed-forward in each block

Legend: b batch, s source tokens, t target tokens, w width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clearhead.layers.cross_attention import Cross
from clearhead.models.config import ModelConfig
from clearhead.models.places import bidirectional_geometry, causal_geometry, check_inputs, cross_geometry
from clearhead.models.stack import Model, Stack
from clearhead.models.state import Seq2SeqState, SourceMemory


class Seq2Seq(Model):
    """An encoder-decoder as `config` describes it; parameters start as `init_parameters(0)` draws them.

    `share_embeddings`: one token table for both; `tie_embeddings`: the output matrix is the decoder's table.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Stack(config, layers=config.layers, bidirectional=True, head=False)
        self.decoder = Stack(
            config,
            layers=config.decoder_depth,
            cross=True,
            embedding=self.encoder.embedding if config.share_embeddings else None,
        )
        self.init_parameters(0)

    def forward(
        self,
        source_bs: Tensor | None,
        tokens_bt: Tensor,
        *,
        source_valid: Tensor | None = None,
        valid: Tensor | None = None,
        state: Seq2SeqState | None = None,
    ) -> Tensor:
        """Return next-token logits of the target [b, t, V], fp32 or better.

        Args:
            source_bs: token ids of the source, integer [b, s]. With a state: needed at its first call, None later.
            tokens_bt: what the decoder reads, integer [b, t].
            source_valid: [b, s] bool, False = padding on the left or right of a row.
            valid: the same for the target. Padding on its right needs none: no earlier token sees it.
            state: from `new_state`; these tokens follow those it holds, and are appended. No gradients.

        Raises `ValueError` when shapes, dtypes or lengths do not fit, with what was expected.
        """
        config = self.config
        check_inputs(config, tokens_bt, None, valid, state)
        held = None if state is None else state.source
        states_bsw = None
        if source_bs is None:
            if held is None or not held.tokens:
                raise ValueError(
                    "source: expected token ids [batch, tokens]; only a state that has read one needs none"
                )
            if source_valid is not None:
                raise ValueError("source_valid: the state has read its source; give it together with the source")
            tokens, source_valid = held.tokens, held.valid
        else:
            if held is not None and held.tokens:
                raise ValueError("source: this state has read its source already; use a new state for another one")
            if source_bs.shape[0] != tokens_bt.shape[0]:
                raise ValueError(
                    f"source and tokens: batch sizes differ, got {source_bs.shape[0]} and {tokens_bt.shape[0]}"
                )
            states_bsw = self.encode(source_bs, valid=source_valid)
            tokens = source_bs.shape[1]
        across = cross_geometry(config, tokens, source_valid, tokens_bt.device)
        crosses = [Cross(across, None if held is None else held.layers[i]) for i in range(len(self.decoder.blocks))]
        dtype = self.decoder.angle_dtype
        geometry = causal_geometry(config, self.decoder.relative, tokens_bt, None, valid, state, dtype=dtype)
        x_btw = self.decoder.embed(tokens_bt, geometry)
        caches = None if state is None else state.caches
        x_btw = self.decoder.transform(x_btw, geometry, caches, states_bsw, crosses)
        if held is not None:
            held.tokens, held.valid = tokens, source_valid
        return self.decoder.logits(x_btw)

    def encode(self, source_bs: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Return the encoder's last hidden states, after its last norm, [b, s, w]."""
        check_inputs(self.config, source_bs, None, valid)
        dtype = self.encoder.angle_dtype
        geometry = bidirectional_geometry(self.config, self.encoder.relative, source_bs, None, valid, dtype=dtype)
        return self.encoder.transform(self.encoder.embed(source_bs, geometry), geometry)

    def new_state(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> Seq2SeqState:
        """Empty caches for `batch` rows of up to `capacity` target tokens, and no source yet.

        dtype: None = what the projections will answer in: the autocast dtype inside autocast, else the parameters' own.
        """
        caches = self.decoder.new_caches(batch, capacity, dtype, device)
        return Seq2SeqState(caches, SourceMemory(len(self.decoder.blocks)))
