"""From a config or a model to the skeleton that the theory reads.

A config is described by what its initialisation asks for, without drawing a weight: one layer of each stack is built on
the meta device and repeated. A model is described by what its weights are now: mean squares, whatever made them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn

from clearhead.anatomy import parts
from clearhead.anatomy.find import anatomy_of, unwrap
from clearhead.anatomy.search import matrices_of
from clearhead.init.embedding_correlation import sinusoid_correlation
from clearhead.init.standard import Draw
from clearhead.init.start import rules_of_anatomy
from clearhead.layers.position.sinusoidal import SinusoidalPosition
from clearhead.layers.residual import ProfiledOmegaSum
from clearhead.models.build import build_head_scale, build_rule
from clearhead.models.config import ModelConfig
from clearhead.models.make import build_model
from clearhead.signal.collector import uncollected
from clearhead.signal.moments.embedding import zipf_repetition
from clearhead.signal.skeleton import (
    AttentionShape,
    Embedding,
    FeedForwardShape,
    Matrix,
    Norm,
    Skeleton,
    Stack,
    SubLayer,
)

SINUSOID_VARIANCE = 0.5
"""Mean square of a sine or cosine."""
ON_SCORES = {
    "alibi": "",
    "t5": " (nothing at the start, where its table is 0)",
    "kerple": "",
    "fire": "",
    "xl": "",
}
"""Positions that a score holds and no moment does, and what may be said for it."""


@uncollected()
def describe(
    source: ModelConfig | nn.Module,
    *,
    tokens: int | None = None,
    repetition: float | None = None,
    segment_repetition: float = 1.0,
    training: bool = True,
) -> Skeleton:
    """Return the skeleton of a config (by its initialisation) or of a model (by its present weights).

    Args:
        source: a `ModelConfig`, or any model that `clearhead.anatomy.find.anatomy_of` knows.
        tokens: length of the sequences; None = the config's context, 128 for a model that does not say.
        repetition: probability that two tokens of a sequence are equal, sum p^2; None = Zipf's law over the
            vocabulary (so that it need no data). `clearhead.init.embedding_correlation.batch_repetition` measures it.
        segment_repetition: the same for segments; 1 = all tokens in one segment.
        training: whether dropout is on.

    Raises `UserError` for a model without attention.
    """
    if isinstance(source, ModelConfig):
        return _Config(source, repetition, segment_repetition).skeleton(tokens or source.context, training)
    model = unwrap(source)
    config = getattr(model, "config", None)
    length = tokens or (config.context if isinstance(config, ModelConfig) else 128)
    return _Model(model, repetition, segment_repetition).skeleton(length, training)


class _Describer:
    """What both ways share: an anatomy, read part by part."""

    def __init__(self, anatomy: parts.Anatomy, repetition: float | None, segment_repetition: float) -> None:
        self.anatomy = anatomy
        self.repetition = repetition
        self.segment_repetition = segment_repetition
        self.notes: list[str] = list(anatomy.notes)

    # ---- what differs ----

    def matrix(self, stack: parts.StackParts, layer: int, index: int, role: str, matrix: parts.Matrix) -> Matrix:
        raise NotImplementedError

    def table(self, stack: parts.StackParts, table: parts.EmbeddingParts) -> float:
        raise NotImplementedError

    def head(self, matrix: parts.Matrix) -> Matrix:
        raise NotImplementedError

    def norm(self, module: nn.Module | None) -> Norm | None:
        raise NotImplementedError

    def embedding_norm(self, stack: parts.StackParts) -> Norm | None:
        return self.norm(stack.embedding_norm)

    def scales(self, stack: parts.StackParts, sub: parts.SubLayerParts) -> tuple[float | None, float]:
        raise NotImplementedError

    def head_scale(self) -> float:
        raise NotImplementedError

    # ---- what is the same ----

    def skeleton(self, tokens: int, training: bool) -> Skeleton:
        anatomy = self.anatomy
        stacks = tuple(
            Stack(
                name=stack.name,
                embedding=self._embedding(stack, tokens),
                layers=tuple(
                    tuple(self._sublayer(stack, layer, index, sub) for index, sub in enumerate(block.sublayers))
                    for layer, block in enumerate(stack.blocks)
                ),
                final_norm=self.norm(stack.final_norm),
                parallel=any(block.parallel for block in stack.blocks),
            )
            for stack in anatomy.stacks
        )
        return Skeleton(
            stacks=stacks,
            width=anatomy.width,
            tokens=tokens,
            head=None if anatomy.head is None else self.head(anatomy.head),
            head_scale=self.head_scale(),
            training=training,
            notes=tuple(dict.fromkeys(self.notes)),
        )

    def _sublayer(self, stack: parts.StackParts, layer: int, index: int, sub: parts.SubLayerParts) -> SubLayer:
        stream, branch = self.scales(stack, sub)
        return SubLayer(
            part=sub.part,
            branch=self._branch(stack, layer, index, sub),
            norm=self.norm(sub.norm),
            placement=sub.placement,
            stream_scale=stream,
            branch_scale=branch,
            dropout=sub.dropout,
            branch_norm=self.norm(sub.branch_norm),
        )

    def _branch(
        self, stack: parts.StackParts, layer: int, index: int, sub: parts.SubLayerParts
    ) -> AttentionShape | FeedForwardShape:
        found = {
            role: self.matrix(stack, layer, index, role, matrix) for role, matrix in matrices_of(sub.branch).items()
        }
        branch = sub.branch
        if isinstance(branch, parts.FeedForwardParts):
            return FeedForwardShape(
                activation=branch.activation,
                up=found["up"],
                down=found["down"],
                gate=found.get("gate"),
                dropout=branch.dropout,
            )
        return AttentionShape(
            heads=branch.heads,
            kv_heads=branch.kv_heads,
            head_dim=branch.head_dim,
            query=found["query"],
            key=found["key"],
            value=found["value"],
            output=found["output"],
            causal=branch.causal,
            spec=branch.spec,
            scale=branch.scale,
            dropout=branch.dropout,
            rope_base=branch.rope_base,
            qk_norm=branch.query_norm is not None,
            cross=branch.cross,
        )

    def _embedding(self, stack: parts.StackParts, tokens: int) -> Embedding:
        variances, correlations = [], []
        for table in sorted(stack.embeddings, key=lambda table: table.role != "token"):
            variances.append(self.table(stack, table))
            correlations.append(self._repetition(table))
        position = getattr(self._scope(stack), "position", None)
        if isinstance(position, SinusoidalPosition):
            variances.append(SINUSOID_VARIANCE)
            correlations.append(sinusoid_correlation(tokens, self.anatomy.width))
        config = getattr(self._scope(stack), "config", None)
        if config is not None and config.position in ON_SCORES:
            self.notes.append(
                f"position={config.position} adds to the scores, and the theory leaves that out"
                f"{ON_SCORES[config.position]}; measured scores have it"
            )
        if not variances:
            self.notes.append(f"{stack.name}: no embedding table was found; its input is taken as independent tokens")
            variances, correlations = [1.0], [0.0]
        return Embedding(
            variances=tuple(variances),
            correlations=tuple(correlations),
            norm=self.embedding_norm(stack),
            dropout=stack.embedding_dropout,
            scale=stack.embedding_scale,
        )

    def _repetition(self, table: parts.EmbeddingParts) -> float:
        if table.role == "position":
            return 0.0
        if table.role == "segment":
            return self.segment_repetition
        if self.repetition is not None:
            return self.repetition
        self.notes.append("the tokens' repetition is Zipf's law over the vocabulary; measured on a batch it is exact")
        return zipf_repetition(getattr(table.module, table.leaf).shape[0])

    def _scope(self, stack: parts.StackParts) -> Any:
        """The module that holds the stack, in our models."""
        if self.anatomy.family != "clearhead":
            return None
        return self.anatomy.model.get_submodule(stack.blocks[0].path.rpartition(".blocks.")[0])


class _Model(_Describer):
    """By the present weights."""

    def __init__(self, model: nn.Module, repetition: float | None, segment_repetition: float) -> None:
        super().__init__(anatomy_of(model), repetition, segment_repetition)

    def matrix(self, stack: parts.StackParts, layer: int, index: int, role: str, matrix: parts.Matrix) -> Matrix:
        return self.head(matrix)

    def head(self, matrix: parts.Matrix) -> Matrix:
        fan_out, fan_in = matrix.shape
        bias = matrix.bias()
        return Matrix(fan_in, fan_out, _square(matrix.weight()), 0.0 if bias is None else _square(bias))

    def table(self, stack: parts.StackParts, table: parts.EmbeddingParts) -> float:
        return _square(getattr(table.module, table.leaf))

    def norm(self, module: nn.Module | None) -> Norm | None:
        return None if module is None else _norm(module, _square)

    def scales(self, stack: parts.StackParts, sub: parts.SubLayerParts) -> tuple[float | None, float]:
        from clearhead.init.foreign import RULE, branch_end

        if isinstance(sub.rule, ProfiledOmegaSum) and not bool(sub.rule.profiled):
            return None, 1.0
        if sub.rule is not None:
            return _scales(sub.rule)
        stream, branch = 1.0, 1.0
        attached = getattr(branch_end(sub), RULE, None)
        if attached is not None:
            branch = _root(attached.scale)
        if sub.residual_module is not None:
            wrapped: Any = getattr(sub.residual_module, RULE, None)
            if hasattr(wrapped, "omega"):
                stream = _root(wrapped.omega)
        return stream, branch

    def head_scale(self) -> float:
        from clearhead.init.foreign import RULE

        head = self.anatomy.head
        attached: Any = None if head is None else getattr(head.module, RULE, None)
        return self.anatomy.head_scale * (1.0 if attached is None else _root(attached.scale))


class _Config(_Describer):
    """By what the initialisation asks for."""

    def __init__(self, config: ModelConfig, repetition: float | None, segment_repetition: float) -> None:
        self.config = config
        depths = config.depths
        # Two layers, and the plain sums, which exist at any depth; the constants come from the config itself.
        small = dataclasses.replace(config, layers=2, init="standard", embedding_norm=config.norms_embedding)
        if config.architecture == "seq2seq":
            small = dataclasses.replace(small, decoder_layers=2)
        with torch.device("meta"):
            model = build_model(small)
        anatomy = anatomy_of(model)
        stacks = tuple(
            dataclasses.replace(stack, blocks=(stack.blocks[0],) * layers)
            for stack, (layers, _) in zip(anatomy.stacks, depths.values())
        )
        super().__init__(dataclasses.replace(anatomy, stacks=stacks), repetition, segment_repetition)
        self.rules = rules_of_anatomy(self.anatomy, config)
        self._rules: dict[bool, tuple[float | None, float]] = {}

    def matrix(self, stack: parts.StackParts, layer: int, index: int, role: str, matrix: parts.Matrix) -> Matrix:
        draw, _ = self.rules.matrix(stack, layer, index, role, matrix)
        fan_out, fan_in = matrix.shape
        return Matrix(fan_in, fan_out, _asked(draw))

    def head(self, matrix: parts.Matrix) -> Matrix:
        fan_out, fan_in = matrix.shape
        if self.anatomy.head_tied:
            stack = self.anatomy.stacks[-1]
            token = next(table for table in stack.embeddings if table.role == "token")
            return Matrix(fan_in, fan_out, self.table(stack, token))
        draw, _ = self.rules.head(matrix.shape)
        return Matrix(fan_in, fan_out, _asked(draw))

    def table(self, stack: parts.StackParts, table: parts.EmbeddingParts) -> float:
        draw, _ = self.rules.embedding(stack, table)
        return _asked(draw)

    def norm(self, module: nn.Module | None) -> Norm | None:
        return None if module is None else _norm(module, lambda weight: 1.0)

    def embedding_norm(self, stack: parts.StackParts) -> Norm | None:
        norm = self.norm(stack.embedding_norm)
        if norm is None:
            return None
        draw, _ = self.rules.embedding_norm(stack)
        return dataclasses.replace(norm, gain=_asked(draw))

    def scales(self, stack: parts.StackParts, sub: parts.SubLayerParts) -> tuple[float | None, float]:
        cross = any(other.part == "cross_attention" for other in stack.blocks[0].sublayers)
        if cross not in self._rules:
            rule = build_rule(self.config, cross=cross)
            self._rules[cross] = (None, 1.0) if isinstance(rule, ProfiledOmegaSum) else _scales(rule)
        return self._rules[cross]

    def head_scale(self) -> float:
        scale = getattr(build_head_scale(self.config), "scale", None)
        return 1.0 if scale is None else _root(scale)


def _asked(draw: Draw) -> float:
    return draw.variance + draw.mean**2


def _norm(module: Any, square: Callable[[torch.Tensor], float]) -> Norm:
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    layer = isinstance(module, nn.LayerNorm) or (bias is not None) or "LayerNorm" in type(module).__name__
    if "T5LayerNorm" in type(module).__name__ or "RMS" in type(module).__name__:
        layer = False
    eps = next((getattr(module, name) for name in ("eps", "variance_epsilon") if getattr(module, name, None)), 1e-5)
    meta = weight is not None and weight.is_meta
    gain = 1.0
    if weight is not None and not meta:
        gain = square(1.0 + weight.detach()) if type(module).__name__.startswith("Gemma") else square(weight)
    shift = 0.0 if bias is None or bias.is_meta else _square(bias)
    return Norm("layer" if layer else "rms", gain, shift, float(eps))


def _scales(rule: nn.Module) -> tuple[float, float]:
    """The two constants of one of `clearhead.layers.residual`'s rules."""
    omega = getattr(rule, "omega", None)
    if omega is not None:
        return _root(omega), 1.0
    stream, branch = getattr(rule, "stream_scale", None), getattr(rule, "branch_scale", None)
    return (1.0, 1.0) if stream is None or branch is None else (_root(stream), _root(branch))


@torch.no_grad()
def _square(tensor: torch.Tensor) -> float:
    whole = getattr(tensor, "full_tensor", None)
    return float((tensor if whole is None else whole()).float().square().mean())


def _root(tensor: torch.Tensor) -> float:
    return _square(tensor.double() if tensor.dtype == torch.float64 else tensor) ** 0.5
