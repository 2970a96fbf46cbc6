"""Residual rules on models whose sums stand in code that we do not change (Hugging Face, torch.nn).

Norms do not see a scale of their input, so two rewritings put the whole rule into one factor on the branch:

    post-norm    LN(lambda x + beta f) = LN(x + (beta / lambda) f)        LN(omega x + f) = LN(x + f / omega)
    pre-norm     with x' = x / lambda^n at sum number n = 0, 1, ...:  x' <- x' + (beta / lambda^(n+1)) f

The factor is a small module `clearhead_rule` on the branch's last matrix, applied by a forward hook: bias included, and
dropout after it commutes. A vector omega sits on the module that receives (branch, stream), as BERT's `BertSelfOutput`.
Both are in the state dict, follow devices and compile into one graph; constants keep fp32 in a half precision model.
`remove_rules` takes them off; `save_pretrained` keeps no hooks, so before it `fold_rules` multiplies them into weights.

What is not exact: a norm's eps stays, where the rewriting asks for eps / lambda^(2n). The stream's variance is about 1,
so with eps = 1e-5 the deviation is at most about 1e-5 times (e^k - 1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.parts import Anatomy, StackParts, SubLayerParts
from clearhead.errors import UserError
from clearhead.init.deepscale import ResidualConstants
from clearhead.layers.scale import Scale, widened

RULE = "clearhead_rule"


class BranchRule(Scale):
    """scale * branch."""


class HeadRule(Scale):
    """scale * hidden state, before the head."""


class StreamRule(nn.Module):
    """omega * stream with a trained vector omega [width]."""

    def __init__(self, width: int, start: float = 1.0) -> None:
        super().__init__()
        self.omega = nn.Parameter(torch.full((width,), start))

    def forward(self, stream_btw: Tensor) -> Tensor:
        """See the class."""
        return (widened(stream_btw) * widened(self.omega)).to(stream_btw.dtype)


# Plain functions that find the rule on the module they are called for, so that a deep copy has hooks of its own.
def _scale_output(module: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return getattr(module, RULE)(output)


def _scale_input(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (getattr(module, RULE)(arguments[0]), *arguments[1:])


def _scale_stream(
    module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    rule = getattr(module, RULE)
    if len(arguments) > 1:
        return (arguments[0], rule(arguments[1]), *arguments[2:]), named
    (name,) = [name for name in named if name in ("input_tensor", "residual")]
    return arguments, {**named, name: rule(named[name])}


def attach_deepscale(anatomy: Anatomy, constants: Mapping[str, ResidualConstants]) -> None:
    """Make every sum lambda x + beta f, as its stack's constants say. Raises `UserError` where that cannot be exact."""
    for stack in anatomy.stacks:
        placement, c = _placement(stack), constants[stack.name]
        if c.stream_scale == 0.0:
            raise UserError("deepscale: lambda = 0 cannot be rewritten as a factor on the branch; lower k (below N)")
        if placement == "pre" and stack.final_norm is None:
            raise UserError(f"deepscale: the {stack.name} is pre-norm with no norm at its end, so its scale shows")
        number = 0
        for block in stack.blocks:
            for sub in block.sublayers:
                number += 1
                power = number if placement == "pre" else 1
                attach_branch(sub, c.branch_scale / c.stream_scale**power)


def attach_branch(sub: SubLayerParts, scale: float) -> BranchRule:
    """Multiply what the branch answers by `scale`."""
    module = branch_end(sub)
    rule = BranchRule(scale)
    _add(module, rule)
    module.register_forward_hook(_scale_output)
    return rule


def attach_stream(sub: SubLayerParts, width: int, start: float = 1.0) -> StreamRule:
    """Multiply the stream by a trained vector before the branch is added; needs `sub.residual_module`."""
    assert sub.residual_module is not None
    rule = StreamRule(width, start)
    _add(sub.residual_module, rule)
    sub.residual_module.register_forward_pre_hook(_scale_stream, with_kwargs=True)
    return rule


def attach_head(anatomy: Anatomy, scale: float) -> None:
    """Multiply the hidden state before the head by `scale`."""
    assert anatomy.head is not None
    _add(anatomy.head.module, HeadRule(scale))
    anatomy.head.module.register_forward_pre_hook(_scale_input)


def remove_rules(model: nn.Module) -> int:
    """Take every rule off `model` and return how many there were: its sums are plain again, its weights as they are."""
    removed = 0
    for module in list(model.modules()):
        if RULE in module._modules:
            delattr(module, RULE)
            removed += 1
            _unhook(module._forward_hooks, _scale_output)
            for key in _unhook(module._forward_pre_hooks, _scale_input, _scale_stream):
                module._forward_pre_hooks_with_kwargs.pop(key, None)
    return removed


def rules_of(model: nn.Module) -> dict[str, nn.Module]:
    """The rules by the path of the module that they sit on."""
    return {
        path.removesuffix(f".{RULE}"): module
        for path, module in model.named_modules()
        if path.rpartition(".")[2] == RULE
    }


def branch_end(sub: SubLayerParts) -> nn.Module:
    """The module whose output the branch is: a norm on the branch if there is one, else its last matrix."""
    if sub.branch_norm is not None:
        return sub.branch_norm
    last = sub.branch.output if hasattr(sub.branch, "output") else sub.branch.down
    return last.module


def needs_omega_vector(anatomy: Anatomy) -> bool:
    """Whether every sum stands in a module that receives the stream, so that it can have a vector omega."""
    return all(sub.residual_module is not None for s in anatomy.stacks for block in s.blocks for sub in block.sublayers)


def _placement(stack: StackParts) -> str:
    placements = {sub.placement for block in stack.blocks for sub in block.sublayers}
    if any(block.parallel for block in stack.blocks) or len(placements) != 1:
        raise UserError(
            f"init: the {stack.name}'s sums are neither all pre-norm nor all post-norm with one branch each; "
            f"residual rules cannot be put on it"
        )
    return placements.pop()


def post_norm_only(anatomy: Anatomy) -> None:
    """Raise `UserError` unless every stack is post-norm, which Admin asks for."""
    for stack in anatomy.stacks:
        if _placement(stack) != "post":
            raise UserError(f"admin: the {stack.name} is pre-norm; Admin is for post-norm models (take deepscale)")


def _add(module: nn.Module, rule: nn.Module) -> None:
    if RULE in module._modules:
        raise UserError("init: layers of this model share a module, and one rule cannot serve several sums")
    reference = next(module.parameters())
    if any(p.is_floating_point() for p in rule.parameters()):
        rule.to(reference.device, reference.dtype)
    module.add_module(RULE, rule.to(reference.device))


def _unhook(hooks: dict[int, Callable[..., Any]], *ours: Callable[..., Any]) -> list[int]:
    keys = [key for key, hook in hooks.items() if any(hook is one for one in ours)]
    for key in keys:
        del hooks[key]
    return keys
