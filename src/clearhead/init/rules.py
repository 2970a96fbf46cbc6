"""The schemes as rules over an anatomy: what each matrix and table starts with, and why."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from clearhead.anatomy.parts import (
    Anatomy,
    AttentionParts,
    EmbeddingParts,
    FeedForwardParts,
    Matrix,
    StackParts,
    SubLayerParts,
)
from clearhead.attention.spec import AttentionSpec, Window
from clearhead.errors import UserError
from clearhead.init import deepscale as ds
from clearhead.init.plan import Start
from clearhead.init.standard import SCHEMES, Draw, constant, normal


@dataclass(frozen=True)
class DeepScaleOptions:
    """See the fields of the same meaning in `clearhead.ModelConfig`."""

    k: float = 2.0
    alpha: float = 1.0
    depth_counts: str = "layers"
    constants: str = "exact"
    tokens: int | None = None
    """Keys that attention averages over; None = many, the published limit."""


class PlainRules:
    """standard, xavier and small on any anatomy; every part of a fused matrix by its own shape."""

    def __init__(self, scheme: str, width: int, layers: int) -> None:
        self.scheme, self.width, self.layers = SCHEMES[scheme], width, layers
        self.name = scheme

    def matrix(self, stack: StackParts, layer: int, index: int, role: str, matrix: Matrix) -> Start:
        """See `Rules`."""
        writes = role in ("output", "down")
        rule = self.scheme.writer if writes else self.scheme.matrix
        return rule(torch.Size(matrix.shape), self.width, self.layers), f"{self.name}, {role}"

    def embedding(self, stack: StackParts, table: EmbeddingParts) -> Start:
        """See `Rules`."""
        shape = getattr(table.module, table.leaf).shape
        return self.scheme.embedding(shape, self.width, self.layers), f"{self.name}, {table.role} embedding"

    def embedding_norm(self, stack: StackParts) -> Start:
        """See `Rules`."""
        return constant(1.0), "norm"

    def head(self, shape: tuple[int, int]) -> Start:
        """See `Rules`."""
        return self.scheme.matrix(torch.Size(shape), self.width, self.layers), f"{self.name}, head"

    def other(self, shape: tuple[int, int]) -> Start:
        """See `Rules`."""
        return self.scheme.matrix(torch.Size(shape), self.width, self.layers), f"{self.name}, other"


class AdminRules(PlainRules):
    """Xavier as fairseq has it, Admin's base: Q, K and V as the rows of one matrix [q + k + v, d]."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__("xavier", width, layers)
        self.name = "admin"

    def matrix(self, stack: StackParts, layer: int, index: int, role: str, matrix: Matrix) -> Start:
        """See `Rules`."""
        branch = stack.blocks[layer].sublayers[index].branch
        if role not in ("query", "key", "value") or not isinstance(branch, AttentionParts):
            return super().matrix(stack, layer, index, role, matrix)
        out = sum(m.shape[0] for m in (branch.query, branch.key, branch.value))
        return xavier_uniform(out, matrix.shape[1]), f"admin, Xavier over the fused [{out}, {matrix.shape[1]}]"


class DeepScaleRules:
    """DeepScaleLM: `clearhead.init.deepscale` on an anatomy.

    Attributes: `constants` and `correlations` per stack, `notes`.
    """

    def __init__(
        self, anatomy: Anatomy, options: DeepScaleOptions, r0: Mapping[str, float], tables: Mapping[str, int]
    ) -> None:
        self.options, self.tables, self.width = options, tables, anatomy.width
        self.constants: dict[str, ds.ResidualConstants] = {}
        self.correlations: dict[str, ds.Correlations] = {}
        self.r0 = dict(r0)
        self.notes: list[str] = []
        for stack in anatomy.stacks:  # the encoder first: cross attention reads its output
            if any(block.parallel for block in stack.blocks):
                raise UserError(
                    "deepscale: attention and feed-forward of a layer read the same input here; the scheme is for "
                    "one branch per residual sum"
                )
            constants = ds.residual_constants(
                len(stack.blocks),
                options.k,
                options.alpha,
                options.depth_counts,
                branches=len(stack.blocks[0].sublayers),
            )
            self.constants[stack.name] = constants
            if constants.stream_scale == 0.0:
                self.notes.append(f"{stack.name}: lambda = 0, the sums drop their stream; lower k or add layers")
            if r0[stack.name] < ds.CORRELATION_FLOOR:
                self.notes.append(
                    f"{stack.name}: embedding correlation {r0[stack.name]:.3g} is below the floor and taken as "
                    f"{ds.CORRELATION_FLOOR:g}"
                )
            layers = [[self._branch(sub) for sub in block.sublayers] for block in stack.blocks]
            self.correlations[stack.name] = ds.correlation_recursion(
                layers, r0[stack.name], constants, embedding_dropout=stack.embedding_dropout
            )

    def matrix(self, stack: StackParts, layer: int, index: int, role: str, matrix: Matrix) -> Start:
        """See `Rules`."""
        sub, fan_in = stack.blocks[layer].sublayers[index], matrix.shape[1]
        branch = sub.branch
        if isinstance(branch, FeedForwardParts):
            return normal(self._feed_forward_std(sub)), f"feed-forward {branch.activation}, p={sub.dropout:g}"
        if role == "key":
            return normal(ds.key_std(fan_in)), "key: 1/sqrt(d)"
        if role == "query":
            std = ds.query_std(fan_in, branch.head_dim, branch.scale)
            return normal(std), "query: scores of variance 1"
        share = self._share(branch, self._seen_correlation(stack, layer, index, branch))[0]
        return normal(ds.value_output_std(fan_in, share, sub.dropout)), f"{role}: share {share:.4g}"

    def embedding(self, stack: StackParts, table: EmbeddingParts) -> Start:
        """See `Rules`."""
        std = ds.embedding_std(stack.embedding_dropout, self.tables[stack.name])
        if table.role == "token":
            std /= stack.embedding_scale
        return normal(std), f"{table.role} embedding, 1 of {self.tables[stack.name]} tables"

    def embedding_norm(self, stack: StackParts) -> Start:
        """The norm answers variance 1 - p, so that the stream has 1 after the dropout that follows."""
        return constant(math.sqrt(1.0 - stack.embedding_dropout)), "embedding norm: sqrt(1-p)"

    def head(self, shape: tuple[int, int]) -> Start:
        """See `Rules`."""
        return normal(shape[1] ** -0.5), "head: logits of variance 1"

    def other(self, shape: tuple[int, int]) -> Start:
        """See `Rules`."""
        return normal(shape[1] ** -0.5), "other: 1/sqrt(d)"

    def _reads(self, branch: AttentionParts) -> bool:
        return branch.cross and "encoder" in self.correlations

    def _seen_correlation(self, stack: StackParts, layer: int, index: int, branch: AttentionParts) -> float:
        if self._reads(branch):
            return self.correlations["encoder"].output
        return self.correlations[stack.name].inputs[layer][index]

    def _share(self, branch: AttentionParts, r: float) -> tuple[float, float]:
        pattern = AttentionSpec.parse(branch.spec).pattern
        window = pattern.size if isinstance(pattern, Window) and not branch.cross else None
        return ds.attention_share(r, self.options.tokens, causal=branch.causal, window=window)

    def _branch(self, sub: SubLayerParts) -> tuple[float, Callable[[float], float]]:
        branch = sub.branch
        if isinstance(branch, AttentionParts):

            def averaged(r: float) -> float:
                share, common = self._share(branch, self.correlations["encoder"].output if self._reads(branch) else r)
                return common / share

            return sub.dropout, averaged
        correlation = ds.feed_forward_correlation(
            self._feed_forward_std(sub),
            branch.up.shape[1],
            branch.activation,
            gated=branch.gate is not None,
            hidden_dropout=branch.dropout,
            constants=self.options.constants,
        )
        return sub.dropout, correlation

    def _feed_forward_std(self, sub: SubLayerParts) -> float:
        branch = sub.branch
        assert isinstance(branch, FeedForwardParts)
        hidden, width = branch.up.shape
        return _feed_forward_std(
            width, hidden, branch.activation, branch.gate is not None, sub.dropout, branch.dropout,
            self.options.constants,
        )  # fmt: skip


class SimplifiedRules(DeepScaleRules):
    """DeepScaleLM without the recursion: V and O as if r were 2, the rest the same."""

    def matrix(self, stack: StackParts, layer: int, index: int, role: str, matrix: Matrix) -> Start:
        """See `Rules`."""
        if role not in ("value", "output"):
            return super().matrix(stack, layer, index, role, matrix)
        dropout = stack.blocks[layer].sublayers[index].dropout
        return normal(ds.simplified_std(matrix.shape[1], dropout)), f"{role}: sqrt(sqrt((1-p)/2)/n)"


def xavier_uniform(fan_out: int, fan_in: int) -> Draw:
    """U(+-sqrt(6 / (fan_in + fan_out))), of variance 2 / (fan_in + fan_out)."""
    return Draw("uniform", math.sqrt(6.0 / (fan_in + fan_out)))


_FEED_FORWARD: dict[tuple[object, ...], float] = {}


def _feed_forward_std(
    width: int, hidden: int, activation: str, gated: bool, dropout: float, hidden_dropout: float, constants: str
) -> float:
    """`deepscale.feed_forward_std`, solved once for equal layers."""
    key = (width, hidden, activation, gated, dropout, hidden_dropout, constants)
    if key not in _FEED_FORWARD:
        _FEED_FORWARD[key] = ds.feed_forward_std(
            width,
            hidden,
            activation,
            gated=gated,
            dropout=dropout,
            hidden_dropout=hidden_dropout,
            constants=constants,
        )
    return _FEED_FORWARD[key]
