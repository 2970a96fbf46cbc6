"""How our own models draw their first parameters: from the config alone.

The plain schemes go by module (clearhead.init.standard); deepscale and admin need to know which matrix is which, and
which layer it stands in (clearhead.anatomy). Every scheme that looks at the depth looks at that of the parameter's own
stack.
"""

from __future__ import annotations

import torch.nn as nn

from clearhead.anatomy.parts import Anatomy
from clearhead.init.embedding_correlation import config_correlation
from clearhead.init.plan import Piece, Rules, draw_plan, make_plan
from clearhead.init.rules import AdminRules, DeepScaleOptions, DeepScaleRules, PlainRules, SimplifiedRules
from clearhead.init.standard import SCHEMES, Draw, start_plan
from clearhead.models.choices import DEEPSCALE
from clearhead.models.config import ModelConfig


def start_parameters(model: nn.Module, config: ModelConfig, seed: int) -> dict[str, Draw]:
    """Draw every parameter anew as `config.init` says; returns how, by parameter.

    Profiled Admin's omega starts at 1 and waits for `clearhead.init.admin.profile_omega`.
    """
    pieces = start_pieces(model, config)
    draw_plan(model, pieces, seed)
    if config.init == "admin":
        _start_omega(model, config)
    return {piece.parameter: piece.draw for piece in pieces}


def start_pieces(model: nn.Module, config: ModelConfig) -> list[Piece]:
    """The plan of `start_parameters`, with reasons."""
    if config.init in SCHEMES:
        return [Piece(name, "", draw, config.init) for name, draw in _plain_plan(model, config).items()]
    from clearhead.anatomy.find import anatomy_of  # reads our models, which read this file

    return make_plan(anatomy_of(model), start_rules(model, config))


def _start_omega(model: nn.Module, config: ModelConfig) -> None:
    from clearhead.anatomy.find import anatomy_of
    from clearhead.init.admin import predicted_omega, set_omega
    from clearhead.layers.residual import ProfiledOmegaSum

    if any(parameter.is_meta for parameter in model.parameters()):
        return
    for module in model.modules():
        if isinstance(module, ProfiledOmegaSum):
            module.profiled.zero_()
    if config.admin_omega == "predicted":
        anatomy, r0 = anatomy_of(model), config.embedding_correlation
        correlation = config_correlation(config) if r0 is None else r0
        set_omega(
            model, predicted_omega(anatomy, {stack.name: correlation for stack in anatomy.stacks}, config.context)
        )


def _plain_plan(model: nn.Module, config: ModelConfig) -> dict[str, Draw]:
    """A layer with cross attention has three branches and counts as one and a half (all together rounded up)."""
    plan: dict[str, Draw] = {}
    for stack, (layers, branches) in config.depths.items():
        whole = start_plan(model, config.init, width=config.width, layers=-(-layers * branches // 2))
        alone = len(config.depths) == 1
        plan |= {name: draw for name, draw in whole.items() if alone or name.startswith(f"{stack}.")}
    return plan


def start_rules(model: nn.Module, config: ModelConfig) -> Rules:
    """The rules of `config.init` for one of our models."""
    from clearhead.anatomy.find import anatomy_of

    return rules_of_anatomy(anatomy_of(model), config)


def rules_of_anatomy(anatomy: Anatomy, config: ModelConfig) -> Rules:
    """The rules of `config.init` for an anatomy, which may stand for a model that nobody built."""
    if config.init in SCHEMES:
        return PlainRules(config.init, config.width, config.layers)
    if config.init not in DEEPSCALE:
        return AdminRules(config.width, config.layers)
    r0 = config.embedding_correlation
    correlation = config_correlation(config) if r0 is None else r0
    simple = config.init == "deepscale_simple"
    published = simple and config.feed_forward != "swiglu"
    options = DeepScaleOptions(
        k=config.deepscale_k,
        alpha=config.deepscale_alpha,
        depth_counts=config.depth_counts,
        constants="published" if published else config.deepscale_constants,
        tokens=config.context if config.deepscale_keys == "context" else None,
    )
    return (SimplifiedRules if simple else DeepScaleRules)(
        anatomy,
        options,
        {stack.name: correlation for stack in anatomy.stacks},
        {stack.name: config.embedding_tables for stack in anatomy.stacks},
    )
