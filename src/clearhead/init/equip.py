"""Give one of our models the modules that a config's initialisation asks for: rules, embedding norm, head scale."""

from __future__ import annotations

import torch.nn as nn

from clearhead.errors import UserError
from clearhead.layers.block import Block
from clearhead.layers.position.sinusoidal import SinusoidalPosition
from clearhead.models.build import build_embedding_norm, build_head_scale, build_position, build_rule
from clearhead.models.config import ModelConfig


def equip(model: nn.Module, config: ModelConfig) -> None:
    """Exchange what differs, in place, and put `config` in the old one's place. Parameters are drawn afterwards.

    Raises `UserError` when a sharded model (FSDP2) would need parameters that it does not have.
    """
    old = model.config
    reference = next(model.parameters())
    sharded = hasattr(reference, "device_mesh")

    def placed(new: nn.Module, present: nn.Module) -> nn.Module:
        if sharded and (any(True for _ in new.parameters()) or any(True for _ in present.parameters())):
            if type(new) is type(present):
                return present
            raise UserError(
                f"init_: {config.init} asks for {type(new).__name__} in the place of {type(present).__name__}, and the "
                f"model is sharded (DTensor); build it with init={config.init}, or call init_ before fully_shard"
            )
        return new.to(reference.device, reference.dtype) if reference.is_floating_point() else new

    for module in list(model.modules()):
        if isinstance(module, Block):
            cross = module.cross_attention is not None
            for name, residual in module.named_children():
                if name.endswith("_residual"):
                    residual.rule = placed(build_rule(config, cross=cross), residual.rule)  # type: ignore[arg-type]
        if getattr(module, "config", None) is old:
            module.config = config  # type: ignore[assignment]
        if isinstance(getattr(module, "embedding_norm", None), nn.Module):
            module.embedding_norm = placed(build_embedding_norm(config), module.embedding_norm)  # type: ignore[arg-type]
            if isinstance(module.position, SinusoidalPosition):
                module.position = build_position(config)  # type: ignore[assignment]
        if isinstance(getattr(module, "head_scale", None), nn.Module):
            module.head_scale = placed(build_head_scale(config), module.head_scale)  # type: ignore[arg-type]
    for child in model.modules():
        child.training = model.training
