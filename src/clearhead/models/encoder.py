"""The encoder: a `Stack` whose tokens see each other in both directions, with a head for masked tokens.

BERT (arXiv 1810.04805) puts another layer, activation and norm between the last block and the output matrix; here the
head is the output matrix alone, as in the other models. Legend: b batch, t tokens, w width, V vocabulary.
"""

from __future__ import annotations

from torch import Tensor

from clearhead.models.config import ModelConfig
from clearhead.models.places import bidirectional_geometry, check_inputs
from clearhead.models.stack import Stack


class Encoder(Stack):
    """A bidirectional model as `config` describes it; parameters start as `init_parameters(0)` draws them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, layers=config.layers, bidirectional=True)
        self.init_parameters(0)

    def forward(
        self,
        tokens_bt: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
        segment_types: Tensor | None = None,
    ) -> Tensor:
        """Return logits of the token at each place [b, t, V], fp32 or better.

        Args as in `hidden`.
        """
        hidden_btw = self.hidden(tokens_bt, segments=segments, valid=valid, segment_types=segment_types)
        return self.logits(hidden_btw)

    def hidden(
        self,
        tokens_bt: Tensor,
        *,
        segments: Tensor | None = None,
        valid: Tensor | None = None,
        segment_types: Tensor | None = None,
    ) -> Tensor:
        """Return the last hidden states, after the last norm, [b, t, w].

        Args:
            tokens_bt: token ids, integer [b, t].
            segments: [b, t] int; a document is a run of equal numbers, attention stays inside it and positions restart.
            valid: [b, t] bool, False = padding on the left or right of a row. What comes out at padding means nothing.
            segment_types: [b, t] rows of the segment table (BERT's token types); None = all 0.

        Raises `ValueError` when shapes, dtypes or lengths do not fit, with what was expected.
        """
        check_inputs(self.config, tokens_bt, segments, valid)
        if segment_types is not None and (self.segment is None or segment_types.shape != tokens_bt.shape):
            raise ValueError(
                f"segment_types: expected integers {tuple(tokens_bt.shape)} and a model with config.segment_types > 0, "
                f"got {tuple(segment_types.shape)} and segment_types={self.config.segment_types}"
            )
        geometry = bidirectional_geometry(
            self.config, self.relative, tokens_bt, segments, valid, dtype=self.angle_dtype
        )
        return self.transform(self.embed(tokens_bt, geometry, segment_types), geometry)
