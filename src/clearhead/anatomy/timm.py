"""timm's vision transformers: `blocks.N.attn.qkv`, `proj`, `norm1`, `norm2`, `mlp.fc1`, `fc2`. timm is not imported."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn as nn

from clearhead.anatomy.rules import Rules


class TimmRules(Rules):
    """Rules of timm's models."""

    family = "timm"

    def causal(self, holder: nn.Module, around: Iterable[nn.Module]) -> bool:
        """See `Rules`: images have no order."""
        return False

    def head(self) -> nn.Module | None:
        """See `Rules`."""
        get = getattr(self.model, "get_classifier", None)
        found = None if get is None else get()
        return found if isinstance(found, nn.Linear) else None


def recognises(model: nn.Module) -> bool:
    """Whether the model's class comes from timm."""
    return any(kind.__module__.split(".")[0] == "timm" for kind in type(model).__mro__)
