"""Where the queries, keys and values of an attention module are made: whole matrices, or slices of fused ones.

A temperature reads the projection as it leaves its matrix, before rotary and before QK-norm; an attention function sees
it afterwards. `projections_of` says, for each attention module of a model, which child makes the three and which part
of what that child answers belongs to whom. The finding is `anatomy/attention.py`'s; here its rows of weights become
slices of outputs.

Legend: b batch, t tokens, h query heads, g key/value heads, d head dim.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch.nn as nn
from torch import Tensor

from clearhead.anatomy import hugging_face
from clearhead.anatomy.attention import find_attentions
from clearhead.anatomy.parts import AttentionParts, Matrix
from clearhead.anatomy.rules import Rules
from clearhead.errors import UserError


@dataclass(frozen=True)
class Slice:
    """A part of what a child module answers."""

    child: str
    """Path of the child, counted from the attention module."""
    rows: tuple[int, int] | None = None
    """Columns [start, stop) of the answer (GPT-2's `c_attn`, Phi-3's `qkv_proj`); None = all."""
    interleaved: tuple[int, int, int] | None = None
    """(heads, parts, part): the answer is [.., heads, parts, d] (GPT-NeoX's `query_key_value`)."""
    span: int = 1
    """Interleaved only: how many neighbouring parts belong to this one (Falcon's grouped queries)."""

    @property
    def fused(self) -> bool:
        """Whether others share the matrix."""
        return self.rows is not None or self.interleaved is not None

    def read(self, answer: Tensor) -> Tensor:
        """[.., everything] -> [.., heads * d]: a view, but for interleaved ones."""
        if self.interleaved is not None:
            heads, parts, part = self.interleaved
            split = answer.unflatten(-1, (heads, parts, -1))
            return split[..., part : part + self.span, :].flatten(-3)
        return answer if self.rows is None else answer[..., self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Projections:
    """Query, key and value of one attention module."""

    query: Slice
    key: Slice
    value: Slice
    heads: int
    kv_heads: int
    head_dim: int


def projections_of(model: nn.Module, modules: Iterable[str]) -> dict[str, Projections]:
    """The projections of the attention modules with these paths in `model`.

    Raises `UserError`, naming the module, where they are not found.
    """
    rules = hugging_face.HuggingFaceRules(model) if hugging_face.recognises(model) else Rules(model)
    found = find_attentions(model, rules)
    return {path: _of(model, path, found) for path in modules}


def _of(model: nn.Module, path: str, found: list[AttentionParts]) -> Projections:
    inside = [parts for parts in found if parts.query.path.startswith(f"{path}." if path else "")]
    wide = {part.heads * part.head_dim == part.query.shape[0] for part in inside}
    if len(inside) != 1 or wide != {True}:
        kind = type(model.get_submodule(path)).__name__
        raise UserError(
            f"{path} ({kind}): {_why(model, path, inside)}; "
            f"patch this model with a spec without '+selective', or with '+learned', which reads no projection"
        )
    parts = inside[0]
    start = len(path) + 1 if path else 0
    return Projections(
        query=_slice(parts.query, start),
        key=_slice(parts.key, start),
        value=_slice(parts.value, start),
        heads=parts.heads,
        kv_heads=parts.kv_heads,
        head_dim=parts.head_dim,
    )


def _why(model: nn.Module, path: str, inside: list[AttentionParts]) -> str:
    wrapped = [name for name, module in model.get_submodule(path).named_modules() if hasattr(module, "base_layer")]
    if wrapped:
        return f"an adapter is wrapped around {wrapped[0]}: patch the model first, add adapters (PEFT) afterwards"
    if len(inside) > 1:
        return f"{len(inside)} attentions were found in it where one was expected"
    if inside:
        rows, heads, head_dim = inside[0].query.shape[0], inside[0].heads, inside[0].head_dim
        return f"its query matrix has {rows} rows, expected {heads} heads of {head_dim} (a gate may be among them)"
    return "no matrices for query, key and value were found in it, which selective temperatures read"


def _slice(matrix: Matrix, start: int) -> Slice:
    return Slice(matrix.path[start:], matrix.rows, matrix.interleaved, matrix.span)
