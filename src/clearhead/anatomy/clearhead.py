"""Our own models: every part has a name, so nothing is searched for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.nn as nn

from clearhead.anatomy.parts import (
    Anatomy,
    AttentionParts,
    BlockParts,
    EmbeddingParts,
    FeedForwardParts,
    StackParts,
    SubLayerParts,
)
from clearhead.anatomy.search import activation_name, drop_rate, is_norm, join, matrix_of, unnamed
from clearhead.layers.attention import Attention
from clearhead.layers.block import Block
from clearhead.layers.feed_forward import SwiGLU
from clearhead.layers.residual import PostNormResidual


def recognise(model: nn.Module) -> Anatomy | None:
    """The anatomy of a model made of our `Block`s, or None."""
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) > 0 and all(isinstance(x, Block) for x in module)
    ]
    if not lists:
        return None
    stacks = tuple(_stack(model, path) for path in lists)
    scope_path = lists[-1].rpartition(".")[0]
    scope: Any = model.get_submodule(scope_path)
    head = getattr(scope, "head", None)
    tables = {id(getattr(part.module, part.leaf)) for stack in stacks for part in stack.embeddings}
    first = stacks[0].blocks[0].sublayers[0].branch
    return unnamed(
        Anatomy(
            model=model,
            family="clearhead",
            stacks=stacks,
            width=(first.query if isinstance(first, AttentionParts) else first.up).shape[1],
            head=matrix_of(head, join(scope_path, "head")) if isinstance(head, nn.Linear) else None,
            head_tied=isinstance(head, nn.Linear) and id(head.weight) in tables,
            head_scale=_constant(getattr(scope, "head_scale", None)),
        )
    )


def _constant(module: Any) -> float:
    scale = getattr(module, "scale", None)
    return float(scale) if scale is not None and not scale.is_meta else 1.0  # the meta device holds no numbers


def _stack(model: nn.Module, path: str) -> StackParts:
    scope_path = path.rpartition(".")[0]
    scope: Any = model.get_submodule(scope_path)
    encodes = "encoder" in f"{scope_path} {type(scope).__name__}".lower()
    embedding_norm, final_norm = _norm(scope, "embedding_norm"), _norm(scope, "norm")
    return StackParts(
        name="encoder" if encodes else "decoder",
        blocks=tuple(
            _block(model, join(path, str(index)), scope, causal=not encodes)
            for index in range(len(model.get_submodule(path)))  # type: ignore[arg-type]
        ),
        embeddings=tuple(_embeddings(scope, scope_path)),
        embedding_norm=embedding_norm,
        embedding_norm_path=None if embedding_norm is None else join(scope_path, "embedding_norm"),
        embedding_dropout=drop_rate(scope.dropout),
        embedding_scale=1.0,
        final_norm=final_norm,
        final_norm_path=None if final_norm is None else join(scope_path, "norm"),
    )


def _norm(scope: nn.Module, name: str) -> nn.Module | None:
    module = getattr(scope, name, None)
    return module if is_norm(module) else None


def _embeddings(scope: nn.Module, path: str) -> Iterator[EmbeddingParts]:
    for name, role in (("embedding", "token"), ("position.table", "position"), ("segment", "segment")):
        table: Any = scope
        for step in name.split("."):
            table = getattr(table, step, None)
        if isinstance(table, nn.Embedding):
            yield EmbeddingParts(table, join(path, name), "weight", role)


def _block(model: nn.Module, path: str, scope: nn.Module, *, causal: bool) -> BlockParts:
    block = model.get_submodule(path)
    sublayers = []
    for name, child in block.named_children():
        if not name.endswith("_residual"):
            continue
        residual: Any = child
        part = name.removesuffix("_residual")
        module = getattr(block, part)
        where = join(path, part)
        branch: AttentionParts | FeedForwardParts
        if isinstance(module, Attention):
            branch = _attention(module, where, scope, causal=causal and "cross" not in part, cross="cross" in part)
        else:
            branch = _feed_forward(module, where)
        norm = residual.norm if is_norm(residual.norm) else None
        sublayers.append(
            SubLayerParts(
                part=part,
                branch=branch,
                norm=norm,
                norm_path=None if norm is None else join(path, f"{name}.norm"),
                placement="post" if isinstance(residual, PostNormResidual) else "pre",
                dropout=drop_rate(residual.dropout),
                rule=residual.rule,
            )
        )
    return BlockParts(block, path, tuple(sublayers))


def _attention(module: Attention, path: str, scope: nn.Module, *, causal: bool, cross: bool) -> AttentionParts:
    config: Any = getattr(scope, "config", None)
    rotary = config is not None and config.position == "rope" and not cross
    return AttentionParts(
        module=module,
        path=path,
        query=matrix_of(module.query, join(path, "query")),
        key=matrix_of(module.key, join(path, "key")),
        value=matrix_of(module.value, join(path, "value")),
        output=matrix_of(module.output, join(path, "output")),
        heads=module.query.out_features // module.head_dim,
        kv_heads=module.key.out_features // module.head_dim,
        head_dim=module.head_dim,
        causal=causal,
        cross=cross,
        dropout=module.dropout,
        rope_base=config.rope_base if rotary else None,
        query_norm=module.query_norm,
        key_norm=module.key_norm,
        spec=str(module.spec),
    )


def _feed_forward(module: Any, path: str) -> FeedForwardParts:
    gated = isinstance(module, SwiGLU) or hasattr(module, "gate")
    activation = "silu" if isinstance(module, SwiGLU) else activation_name(module.activation)
    return FeedForwardParts(
        module=module,
        path=path,
        activation=activation or "unknown",
        up=matrix_of(module.up, join(path, "up")),
        down=matrix_of(module.down, join(path, "down")),
        gate=matrix_of(module.gate, join(path, "gate")) if gated else None,
    )
