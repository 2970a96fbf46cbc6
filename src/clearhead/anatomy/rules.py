"""What a family of models answers to the questions that structure alone leaves open.

`Rules` itself is for a model of unknown origin: it answers by attributes that modules usually have, and says what it
had to assume. `hugging_face.py`, `torch_layers.py` and `timm.py` know more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn as nn

from clearhead.anatomy import names
from clearhead.anatomy.search import drop_rate


class Rules:
    """The questions. `notes` collects what was assumed; everything else is read from the model."""

    family = "unknown"

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.config: Any = getattr(model, "config", None)
        self.notes: list[str] = []

    def assume(self, text: str) -> None:
        """Note an assumption, once."""
        if text not in self.notes:
            self.notes.append(text)

    # ---- attention ----

    def head_count(self, holder: nn.Module, around: Iterable[nn.Module]) -> int | None:
        """Query heads, or None when no module around says it."""
        return self._number(names.HEADS, holder, around)

    def key_value_head_count(self, holder: nn.Module, around: Iterable[nn.Module]) -> int | None:
        """Key and value heads, or None when nobody says it (then as many as query heads)."""
        return self._number(names.KEY_VALUE_HEADS, holder, around)

    def _number(self, attributes: tuple[str, ...], holder: nn.Module, around: Iterable[nn.Module]) -> int | None:
        for place in (holder, *around, self.config):
            for name in attributes:
                value = getattr(place, name, None)
                if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                    return value
        return None

    def interleaved(self, holder: nn.Module, path: str) -> str | None:
        """How the rows of a fused QKV lie: None = queries, keys, values one after the other; "heads" = by head;
        "groups" = by key/value head, its query heads first; "fours" = four blocks of queries, values, keys."""
        return None

    def causal(self, holder: nn.Module, around: Iterable[nn.Module]) -> bool:
        """Whether a self-attention hides the future."""
        for place in (holder, *around, self.config, self.model):
            for name in ("is_causal", "causal", "masked"):
                value = getattr(place, name, None)
                if isinstance(value, bool):
                    return value
            for buffer in getattr(place, "_buffers", {}).values() if isinstance(place, nn.Module) else ():
                if isinstance(buffer, torch.Tensor) and buffer.dim() >= 2 and _lower_triangular(buffer):
                    return True
        if self.batch_first():
            for place in (holder, *list(around)[:-1]):  # the last one is the whole model
                hides = _hides_the_future(place)
                if hides is not None:
                    return hides
        self.assume("nothing in the model says whether its attention is causal; taken as not causal")
        return False

    def scale(self, holder: nn.Module, head_dim: int) -> float | None:
        """The scale of the scores; None = 1 / sqrt(head_dim)."""
        for name in names.SCALES:
            value = getattr(holder, name, None)
            if isinstance(value, float):
                return None if abs(value - head_dim**-0.5) < 1e-6 else value
        return None

    def rope_base(self, holder: nn.Module) -> float | None:
        """Base of the rotary frequencies; None = no rotary positions."""
        for module in self.model.modules():
            if "rotary" in type(module).__name__.lower():
                base = getattr(module, "base", None)
                if isinstance(base, int | float):
                    return float(base)
                self.assume("rotary positions with a base that is not said; taken as 10000")
                return 10000.0
        return None

    def weight_dropout(self, holder: nn.Module) -> float:
        """Dropout on the attention weights."""
        return self._dropout(holder, ("attn_dropout", "attention_dropout", "attn_drop", "attn_pdrop", "dropout"))

    # ---- residuals ----

    def branch_dropout(self, part: str, places: list[nn.Module]) -> float:
        """Dropout on what a branch answers; `places` are modules that may hold it, the innermost first."""
        own = {
            "attention": ("post_attention_dropout", "resid_attn_dropout", "dropout1"),
            "cross_attention": ("dropout2",),
            "feed_forward": ("post_mlp_dropout", "resid_mlp_dropout", "output_dropout", "drop2"),
        }[part]
        usual = ("resid_dropout", "resid_drop", "output_dropout", "proj_drop", "out_drop", "hidden_dropout", "dropout")
        for place in places:
            for name in (*own, *usual):
                value = getattr(place, name, None)
                if isinstance(value, nn.Module | float | int) and not isinstance(value, bool):
                    return drop_rate(value)
        return 0.0

    def hidden_dropout(self, module: nn.Module, inner: bool) -> float:
        """Dropout on the feed-forward's hidden activation. `inner`: a wrapper around `module` has the branch's own."""
        found = self._dropout(module, ("activation_dropout", "intermediate_dropout", "drop1", "hidden_drop"))
        return found or (self._dropout(module, ("dropout",)) if inner else 0.0)

    def _dropout(self, place: nn.Module, attributes: tuple[str, ...]) -> float:
        for name in attributes:
            value = getattr(place, name, None)
            if isinstance(value, nn.Module | float | int) and not isinstance(value, bool):
                return drop_rate(value)
        return 0.0

    def placement(
        self, block: nn.Module, path: str, norms: list[nn.Module], branches: list[nn.Module], final: bool
    ) -> str:
        """pre or post. Here: by running the block on random numbers; if that fails, by whether a final norm follows."""
        order = _order_of_calls(block, norms + branches, self._width(norms))
        if order is not None and order and order[0] in norms:
            return "pre"
        if order is not None and order and order[-1] in norms:
            return "post"
        placement = "pre" if final else "post"
        self.assume(
            f"{path or 'the block'} could not be run alone; its norms are taken as {placement}-norms because the model "
            f"has {'a' if final else 'no'} final norm"
        )
        return placement

    @staticmethod
    def _width(norms: list[nn.Module]) -> int:
        return next((p.shape[0] for norm in norms for p in norm.parameters()), 0)

    def parallel(self, block: nn.Module) -> bool:
        """Whether a layer's branches read the same stream, beyond those that share one norm."""
        return False

    # ---- ends ----

    def embedding_scale(self, scope: nn.Module, table: nn.Module | None) -> float:
        """What the token table's rows are multiplied by."""
        for place in (table, scope):
            value = getattr(place, "embed_scale", None)
            if isinstance(value, torch.Tensor) and value.numel() == 1:
                return float(value)
            if isinstance(value, float | int) and not isinstance(value, bool):
                return float(value)
        return 1.0

    def head(self) -> nn.Module | None:
        """The map to logits, when the family knows it better than by its name."""
        return None

    def head_scale(self) -> float:
        """What the last hidden state is multiplied by before the head."""
        return 1.0

    def final_norm_is_embedding_norm(self) -> bool:
        """Whether the norm beside the list of blocks stands before them."""
        return False

    def batch_first(self) -> bool:
        """Whether activations are [batch, tokens, width]."""
        found = [m.batch_first for m in self.model.modules() if isinstance(m, nn.MultiheadAttention)]
        return all(found)


def _lower_triangular(mask: torch.Tensor) -> bool:
    square = mask.detach().reshape(-1, *mask.shape[-2:])[0]
    if square.shape[0] != square.shape[1] or square.shape[0] < 2 or square.is_meta:
        return False
    if square.dtype.is_floating_point and torch.isinf(square).any():
        square = torch.isfinite(square)
    square = square.bool()
    n = square.shape[0]
    lower = torch.ones(n, n, dtype=torch.bool, device=square.device).tril()
    return bool((square == lower).all()) or bool((~square == lower).all())


@torch.no_grad()
def _hides_the_future(module: nn.Module) -> bool | None:
    """Whether an edit of the last token leaves the others as they were; None where a stream alone cannot be run."""
    parameter = next((p for p in module.parameters() if p.dim() == 2), None)
    if parameter is None:
        return None
    x = torch.linspace(-1.0, 1.0, 4 * parameter.shape[1]).sin().reshape(1, 4, -1).to(parameter)
    edited = x.clone()
    edited[:, -1] += 1.0
    answers = []
    try:
        with torch.random.fork_rng(devices=[]):
            for stream in (x, edited):
                torch.manual_seed(0)
                out = module(stream)
                answers.append(out[0] if isinstance(out, tuple) else out)
        before, after = answers
        if before.shape != x.shape or torch.equal(before[:, -1], after[:, -1]):
            return None
        return bool(torch.equal(before[:, :-1], after[:, :-1]))
    except Exception:  # another signature, or it needs more than the stream; the caller says so
        return None


@torch.no_grad()
def _order_of_calls(block: nn.Module, modules: list[nn.Module], width: int) -> list[nn.Module] | None:
    """In which order a block calls `modules` on a random stream; None where it cannot be run with a stream alone."""
    order: list[nn.Module] = []
    hooks = [m.register_forward_pre_hook(lambda module, args: order.append(module)) for m in set(modules)]
    parameter = next(block.parameters(), None)
    if parameter is None or width == 0:
        return None
    try:
        with torch.random.fork_rng(devices=[]):
            block(torch.randn(2, 3, width).to(parameter))
    except Exception:  # another signature, or it needs more than the stream; the caller says so
        return None
    finally:
        for hook in hooks:
            hook.remove()
    return order
