"""Admin on models whose sums stand in code that we do not change: attach omega, and profile it.

Where a module receives (branch, stream), omega is a trained vector on it; elsewhere 1/omega is a constant on the
branch. It is read at its last matrix, before its dropout; what dropout does to its variance is taken in expectation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.parts import Anatomy, StackParts, SubLayerParts
from clearhead.errors import UserError
from clearhead.init.admin import Batch, call, padding_mask, training_pass
from clearhead.init.foreign import BranchRule, StreamRule, attach_branch, attach_stream, branch_end, needs_omega_vector

Omegas = Mapping[str, list[float]]


def attach_omegas(anatomy: Anatomy, omegas: Omegas, form: str = "vector") -> str:
    """Give every sum its omega: trained vectors where all sums can have one and `form` asks for it, else constants.

    Returns the form that was taken.
    """
    vectors = form == "vector" and needs_omega_vector(anatomy)
    for stack in anatomy.stacks:
        for sub, omega in zip(sublayers(stack), omegas[stack.name], strict=True):
            if vectors:
                attach_stream(sub, anatomy.width, omega)
            else:
                attach_branch(sub, 1.0 / omega)
    return "vector" if vectors else "constant"


def sublayers(stack: StackParts) -> list[SubLayerParts]:
    """The branches of a stack in the order of the computation."""
    return [sub for block in stack.blocks for sub in block.sublayers]


@torch.no_grad()
def profile(anatomy: Anatomy, batch: Batch, *, include_padding: bool = False, seed: int = 0) -> dict[str, list[float]]:
    """Attach omega = 1 everywhere, run `batch` once in train mode and set every omega within that pass.

    As `clearhead.init.admin.profile_omega`. The variance of the first stream is measured where a module receives it,
    and taken as 1 / (1 - p) behind an embedding norm, 1 without, elsewhere.
    """
    model = anatomy.model
    attach_omegas(anatomy, {stack.name: [1.0] * len(sublayers(stack)) for stack in anatomy.stacks})
    answer: dict[str, list[float]] = {stack.name: [] for stack in anatomy.stacks}
    handles: list[Any] = []
    try:
        for stack in anatomy.stacks:
            mask_bt = None if include_padding else padding_mask(model, batch, stack.name)
            if mask_bt is not None and not stack.batch_first:
                mask_bt = mask_bt.t()
            watcher = _Watcher(stack, mask_bt, answer[stack.name])
            for sub in sublayers(stack):
                handles += watcher.watch(sub)
        with training_pass(model, seed):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for stack in anatomy.stacks:
        subs, found = sublayers(stack), answer[stack.name]
        if len(found) != len(subs):
            raise UserError(
                f"admin: {len(found)} of the {stack.name}'s {len(subs)} branches ran, each must run once; "
                f"give the arguments that reach the whole model"
            )
        if dist.is_available() and dist.is_initialized():
            values = torch.tensor(found, dtype=torch.float64)
            dist.broadcast(values, 0)
            answer[stack.name] = found = values.tolist()
            for sub, omega in zip(subs, found):
                set_omega(sub, omega)
    return answer


def set_omega(sub: SubLayerParts, omega: float) -> None:
    """Write omega into whichever rule the sum has."""
    rule = rule_of(sub)
    if isinstance(rule, StreamRule):
        rule.omega.data.fill_(omega)
    else:
        rule.scale.fill_(1.0 / omega)


def rule_of(sub: SubLayerParts) -> StreamRule | BranchRule:
    """The rule of a sum."""
    from clearhead.init.foreign import RULE

    for module in (sub.residual_module, branch_end(sub)):
        rule = None if module is None else module._modules.get(RULE)
        if isinstance(rule, StreamRule | BranchRule):
            return rule
    raise UserError("admin: this sum has no omega")


class _Watcher:
    """The running omega of one stack."""

    def __init__(self, stack: StackParts, mask_bt: Tensor | None, found: list[float]) -> None:
        self.mask_bt, self.found = mask_bt, found
        self.omega2 = 1.0
        self.stream = 1.0 / (1.0 - stack.embedding_dropout) if stack.embedding_norm is not None else 1.0

    def watch(self, sub: SubLayerParts) -> list[Any]:
        handles = []
        if isinstance(rule_of(sub), StreamRule):
            assert sub.residual_module is not None

            def enter(module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                set_omega(sub, self.omega2**0.5)
                stream_btw = arguments[1] if len(arguments) > 1 else next(iter(named.values()))
                self.stream = self._moments(stream_btw)[1]

            handles.append(sub.residual_module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True))

        def leave(module: nn.Module, arguments: Any, branch_btw: Tensor) -> None:
            self.found.append(self.omega2**0.5)
            set_omega(sub, self.found[-1])
            mean, variance = self._moments(branch_btw)
            dropped = (variance + mean**2) / (1.0 - sub.dropout) - mean**2
            self.omega2 = self.omega2 * self.stream + dropped
            self.stream = 1.0

        handles.append(branch_end(sub).register_forward_hook(leave, prepend=True))
        return handles

    def _moments(self, x_btw: Tensor) -> tuple[float, float]:
        wide = x_btw.to(torch.promote_types(x_btw.dtype, torch.float32))
        if self.mask_bt is not None:
            wide = wide[self.mask_bt]
        return float(wide.mean()), float(wide.var(correction=0))
