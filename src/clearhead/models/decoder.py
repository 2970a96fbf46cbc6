"""The decoder-only transformer: a `Stack` whose tokens see what stands before them.

Legend: b batch, t tokens, w width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clearhead.models.config import ModelConfig
from clearhead.models.places import causal_geometry, check_inputs
from clearhead.models.stack import Stack
from clearhead.models.state import DecoderState


class Decoder(Stack):
    """A causal language model as `config` describes it; parameters start as `init_parameters(0)` draws them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, layers=config.layers)
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
        check_inputs(self.config, tokens_bt, segments, valid, state)
        geometry = causal_geometry(self.config, self.relative, tokens_bt, segments, valid, state)
        x_btw = self.embed(tokens_bt, geometry)
        return self.logits(self.transform(x_btw, geometry, None if state is None else state.caches))

    def new_state(
        self, batch: int, capacity: int, *, dtype: torch.dtype | None = None, device: Any = None
    ) -> DecoderState:
        """Empty caches for `batch` rows of up to `capacity` tokens.

        dtype: None = what the projections will answer in: the autocast dtype inside autocast, else the parameters' own.
        """
        return DecoderState(self.new_caches(batch, capacity, dtype, device))
