"""torch.nn.TransformerEncoder, TransformerDecoder, Transformer, and models built of their layers."""

from __future__ import annotations

import torch.nn as nn

from clearhead.anatomy.rules import Rules
from clearhead.anatomy.search import drop_rate

LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class TorchRules(Rules):
    """Rules of torch's own layers, which carry everything but causality, an argument of the call."""

    family = "torch"

    def placement(
        self, block: nn.Module, path: str, norms: list[nn.Module], branches: list[nn.Module], final: bool
    ) -> str:
        """See `Rules`."""
        if isinstance(block, LAYERS):
            return "pre" if block.norm_first else "post"
        return super().placement(block, path, norms, branches, final)

    def causal(self, holder: nn.Module, around: object) -> bool:
        """See `Rules`: a decoder layer's self-attention is taken as causal, an encoder layer's as not."""
        text = "causality is an argument of torch's layers; taken as on in decoder layers, off in encoder layers"
        self.assume(text)
        return isinstance(next(iter(around), None), nn.TransformerDecoderLayer)  # type: ignore[call-overload]

    def branch_dropout(self, part: str, places: list[nn.Module]) -> float:
        """See `Rules`."""
        block = places[-1]
        if isinstance(block, nn.TransformerDecoderLayer):
            name = {"attention": "dropout1", "cross_attention": "dropout2", "feed_forward": "dropout3"}[part]
            return drop_rate(getattr(block, name))
        if isinstance(block, nn.TransformerEncoderLayer):
            return drop_rate(block.dropout1 if part == "attention" else block.dropout2)
        return super().branch_dropout(part, places)

    def hidden_dropout(self, module: nn.Module, inner: bool) -> float:
        """See `Rules`."""
        return drop_rate(module.dropout) if isinstance(module, LAYERS) else super().hidden_dropout(module, inner)


def recognises(model: nn.Module) -> bool:
    """Whether the model has one of torch's transformer layers."""
    return any(isinstance(module, LAYERS) for module in model.modules())
