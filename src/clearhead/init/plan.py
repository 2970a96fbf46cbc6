"""A plan over a model's anatomy: every parameter once (a fused one part by part), each with its draw and its reason.

Drawn like the standard plan: each piece from its own generator, seeded by (seed, parameter name, part).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.parts import Anatomy, EmbeddingParts, Matrix, StackParts, SubLayerParts
from clearhead.anatomy.search import is_norm, matrices_of
from clearhead.init.standard import Draw, constant, parameter_seed

KEPT = Draw("kept", 0.0)


@dataclass(frozen=True, eq=False)
class Piece:
    """A parameter, or the part of a fused one that is one matrix."""

    parameter: str
    """Name in `model.named_parameters()`."""
    part: str
    """query | key | ... of a fused parameter; empty for a whole one."""
    draw: Draw
    rule: str
    """Why so, in words."""
    matrix: Matrix | None = None
    """How a part is reached; None for a whole parameter."""

    @property
    def name(self) -> str:
        """The parameter, and which part of it."""
        return f"{self.parameter}[{self.part}]" if self.part else self.parameter


Start = tuple[Draw, str]


class Rules(Protocol):
    """A scheme: draws and reasons for the parts of an anatomy."""

    def matrix(self, stack: StackParts, layer: int, index: int, role: str, matrix: Matrix) -> Start:
        """A matrix of branch number `index` of a layer."""

    def embedding(self, stack: StackParts, table: EmbeddingParts) -> Start:
        """A table of the first stream."""

    def embedding_norm(self, stack: StackParts) -> Start:
        """The weight of a norm on the embedding."""

    def head(self, shape: tuple[int, int]) -> Start:
        """An output matrix of its own."""

    def other(self, shape: tuple[int, int]) -> Start:
        """A linear map that is no part of a block (a pooler, the dense layer of a masked-LM head)."""


def make_plan(anatomy: Anatomy, rules: Rules) -> list[Piece]:
    """Plan every parameter of `anatomy.model`, in the order of `named_parameters()`.

    Biases start at 0, norms as the identity; a module's own `start_values()` come before that. What plays no part that
    a scheme knows (a convolution, say) is kept as it is, and the plan says so.

    Raises `RuntimeError` when the parts of a fused parameter do not cover it exactly.
    """
    model = anatomy.model
    matrices: dict[int, list[tuple[str, Matrix, Start]]] = {}
    for stack, layer, index, _, role, matrix in every_matrix(anatomy):
        start = rules.matrix(stack, layer, index, role, matrix)
        entries = matrices.setdefault(id(getattr(matrix.module, matrix.leaf)), [])
        if not any(same_part(matrix, earlier) for _, earlier, _ in entries):  # a matrix that layers share is drawn once
            entries.append((role, matrix, start))
    whole: dict[int, Start] = {}
    for stack in anatomy.stacks:
        for table in stack.embeddings:
            whole.setdefault(id(getattr(table.module, table.leaf)), rules.embedding(stack, table))
        weight = getattr(stack.embedding_norm, "weight", None)
        if weight is not None:
            whole[id(weight)] = rules.embedding_norm(stack)
    if anatomy.head is not None:
        whole.setdefault(id(getattr(anatomy.head.module, anatomy.head.leaf)), rules.head(anatomy.head.shape))

    modules, claimed = dict(model.named_modules()), _claimed(model)
    pieces: list[Piece] = []
    for name, parameter in model.named_parameters():
        path = name.rpartition(".")[0]
        entries = matrices.get(id(parameter), [])
        if not parameter.requires_grad:
            pieces.append(Piece(name, "", KEPT, "not trained"))
        elif entries:
            if sum(matrix.weight().numel() for _, matrix, _ in entries) != parameter.numel():
                raise RuntimeError(f"init: the parts of {name} do not cover it exactly")
            fused = len(entries) > 1
            for role, matrix, (draw, rule) in entries:
                pieces.append(Piece(name, role if fused else "", draw, rule, matrix if fused else None))
        elif name in claimed:
            pieces.append(Piece(name, "", claimed[name], f"{type(modules[path]).__name__}'s own start"))
        elif id(parameter) in whole:
            pieces.append(Piece(name, "", *whole[id(parameter)]))
        else:
            pieces.append(Piece(name, "", *_remaining(modules[path], name, parameter, rules)))
    return pieces


def draw_plan(model: nn.Module, pieces: Iterable[Piece], seed: int) -> None:
    """Fill the parameters as planned; those on the meta device are left alone. A padding row stays 0."""
    parameters, modules = dict(model.named_parameters()), dict(model.named_modules())
    with torch.no_grad():
        for piece in pieces:
            parameter = parameters[piece.parameter]
            if parameter.is_meta:
                continue
            generator = torch.Generator().manual_seed(parameter_seed(seed, piece.name))
            if piece.matrix is None or piece.draw.kind == "kept":
                piece.draw.fill(parameter, generator)
            else:
                if hasattr(parameter, "device_mesh"):
                    raise ValueError(
                        f"init: {piece.parameter} is fused and sharded (DTensor); call init_ before fully_shard"
                    )
                values = piece.draw.values(piece.matrix.shape, generator)
                piece.matrix.write(values.to(parameter.device, parameter.dtype))
            owner = modules[piece.parameter.rpartition(".")[0]]
            if isinstance(owner, nn.Embedding) and owner.padding_idx is not None and piece.draw.kind != "kept":
                parameter[owner.padding_idx] = 0.0


def every_matrix(anatomy: Anatomy) -> Iterator[tuple[StackParts, int, int, SubLayerParts, str, Matrix]]:
    """(stack, layer, branch number in the layer, branch, role, matrix) in the order of the computation."""
    for stack in anatomy.stacks:
        for layer, block in enumerate(stack.blocks):
            for index, sub in enumerate(block.sublayers):
                for role, matrix in matrices_of(sub.branch).items():
                    yield stack, layer, index, sub, role, matrix


def same_part(one: Matrix, other: Matrix) -> bool:
    """Whether two matrices of one parameter are the same part of it."""
    return (one.rows, one.interleaved, one.span) == (other.rows, other.interleaved, other.span)


def _claimed(model: nn.Module) -> dict[str, Draw]:
    answer = {}
    for path, module in model.named_modules():
        start_values = getattr(module, "start_values", None)
        if start_values is not None:
            for name, value in start_values().items():
                answer[f"{path}.{name}" if path else name] = value if isinstance(value, Draw) else constant(value)
    return answer


def _remaining(module: nn.Module, name: str, parameter: Tensor, rules: Rules) -> Start:
    leaf = name.rpartition(".")[2]
    if is_norm(module):
        if leaf == "bias":
            return constant(0.0), "norm"
        # Gemma multiplies by 1 + weight.
        return constant(0.0 if type(module).__name__.startswith("Gemma") else 1.0), "norm"
    if leaf.endswith("bias") and parameter.dim() == 1:
        return constant(0.0), "bias"
    if isinstance(module, nn.Embedding) and "relative" in name:
        return constant(0.0), "relative positions: none at first"
    if isinstance(module, nn.Linear) and leaf == "weight":
        return rules.other((module.out_features, module.in_features))
    return KEPT, "plays no part that the scheme knows"
