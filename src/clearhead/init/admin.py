"""Admin (arXiv 2004.08249) on our Post-LN models: profile omega, or predict it. `clearhead.init.fold` folds it away.

    x <- LN(omega x + f(x))        omega_i^2 = 1 + sum over earlier branches of Var f_j, each stack for itself

Profiling is one forward pass in train mode with the real dropout; omega is set branch by branch within that pass, as in
the authors' code. Differences from it, stated: padding is left out unless asked for, variances are taken in fp32 on the
model's device, "not profiled" is a flag and not the value 1, and under torch.distributed rank 0's omega is sent to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.parts import Anatomy, AttentionParts, Matrix, SubLayerParts
from clearhead.errors import UserError
from clearhead.init.deepscale import attention_share
from clearhead.layers.residual import ProfiledOmegaSum

Batch = Tensor | Mapping[str, Any] | tuple[Any, ...] | Callable[[nn.Module], Any]


def omega_rules(model: nn.Module) -> dict[str, list[ProfiledOmegaSum]]:
    """The rules of profiled Admin by stack, in the order of the computation; {} where the model has none."""
    from clearhead.anatomy.find import anatomy_of

    if not any(isinstance(module, ProfiledOmegaSum) for module in model.modules()):
        return {}
    found = {}
    for stack in anatomy_of(model).stacks:
        rules = [sub.rule for block in stack.blocks for sub in block.sublayers]
        found[stack.name] = [rule for rule in rules if isinstance(rule, ProfiledOmegaSum)]
    return found


def needs_profile(model: nn.Module) -> bool:
    """Whether some omega waits for its profile (reads one number of each on the host)."""
    return any(not bool(module.profiled) for module in model.modules() if isinstance(module, ProfiledOmegaSum))


@torch.no_grad()
def profile_omega(
    model: nn.Module,
    batch: Batch,
    *,
    include_padding: bool = False,
    masks: Mapping[str, Tensor | None] | None = None,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Run `batch` once in train mode and set every omega; returns the omegas by stack.

    Args:
        batch: token ids [b, t], or the model's arguments (a mapping of names, or a tuple), or a function that runs the
            model that it is given.
        include_padding: count padded positions too, as the original does.
        masks: real positions by stack, [b, t] bool, where the batch does not say them by name.
        seed: of the pass's dropout.

    Module modes, random number generators and gradients are as they were afterwards. Under torch.distributed every
    process must call it; rank 0's result holds. Raises `UserError` for a model without rules to profile.
    """
    stacks = omega_rules(model)
    if not stacks:
        raise UserError("profile_omega: this model has no omega to profile; build it with init=admin, or use init_")
    for rules in stacks.values():
        if any(hasattr(rule.omega, "device_mesh") for rule in rules):
            raise UserError("profile_omega: the parameters are sharded (DTensor); profile before fully_shard")
    running: dict[str, float] = dict.fromkeys(stacks, 1.0)
    answer: dict[str, list[float]] = {name: [] for name in stacks}

    def watch(stack: str, mask_bt: Tensor | None) -> Any:
        def see(rule: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
            assert isinstance(rule, ProfiledOmegaSum)
            stream_btw, branch_btw = arguments
            answer[stack].append(running[stack] ** 0.5)
            rule.omega.fill_(answer[stack][-1])
            running[stack] = running[stack] * _variance(stream_btw, mask_bt) + _variance(branch_btw, mask_bt)

        return see

    handles = []
    try:
        for stack, rules in stacks.items():
            mask_bt = None
            if not include_padding:
                mask_bt = padding_mask(model, batch, stack) if masks is None else masks.get(stack)
            handles += [rule.register_forward_pre_hook(watch(stack, mask_bt)) for rule in rules]
        with training_pass(model, seed):
            call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    for stack, rules in stacks.items():
        if len(answer[stack]) != len(rules):
            raise RuntimeError(f"profile_omega: expected each of the {len(rules)} {stack} branches to run once")
        for index, rule in enumerate(rules):
            if dist.is_available() and dist.is_initialized():
                dist.broadcast(rule.omega.data, 0)
                answer[stack][index] = float(rule.omega[0])
            rule.profiled.fill_(1)
    return answer


@torch.no_grad()
def set_omega(model: nn.Module, omegas: Mapping[str, list[float]]) -> None:
    """Set every omega by stack and mark it as profiled."""
    for stack, rules in omega_rules(model).items():
        if len(omegas[stack]) != len(rules):
            raise ValueError(f"omega: expected {len(rules)} values for the {stack}, got {len(omegas[stack])}")
        for rule, value in zip(rules, omegas[stack]):
            rule.omega.fill_(value)
            rule.profiled.fill_(1)


def call(model: nn.Module, batch: Batch) -> Any:
    """Run the model on `batch`; see `profile_omega`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    if callable(batch) and not isinstance(batch, Tensor):
        return batch(model)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


def padding_mask(model: object, batch: Batch, stack: str) -> Tensor | None:
    """Which positions of `stack` are real tokens, [b, t] bool, as the batch says; None = all.

    Our names: valid, source_valid (a seq2seq's encoder); Hugging Face's: attention_mask, decoder_attention_mask.
    """
    if not isinstance(batch, Mapping):
        return None
    two = getattr(getattr(model, "config", None), "architecture", None) == "seq2seq" or "decoder_input_ids" in batch
    names = ("valid", "attention_mask")
    if two:
        names = ("source_valid", "attention_mask") if stack == "encoder" else ("valid", "decoder_attention_mask")
    found = next((batch[name] for name in names if batch.get(name) is not None), None)
    return found.bool() if found is not None and found.dim() == 2 else None


@contextmanager
def training_pass(model: nn.Module, seed: int) -> Iterator[None]:
    """Every module in train mode, generators seeded; both as before afterwards."""
    modes = {module: module.training for module in model.modules()}
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            model.train()
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def _variance(x_btw: Tensor, mask_bt: Tensor | None) -> float:
    wide = x_btw.to(torch.promote_types(x_btw.dtype, torch.float32))
    return float((wide if mask_bt is None else wide[mask_bt]).var(correction=0))


def predicted_omega(anatomy: Anatomy, r0: Mapping[str, float], tokens: int | None = None) -> dict[str, list[float]]:
    """omega by stack from the weights' variances alone, without data.

        attention      Var f = d var_v * n var_o * m s / (1 - p)            s: variance of the stream, 1 behind a norm
        feed-forward   Var f = hidden var_2 E[act(N(0, d var_1 s))^2] / ((1 - p)(1 - p_hidden))

    with the token correlation r of the stream followed from `r0` (of the embedding, before its dropout) through the
    weighted sums, and m the share of it that attention over `tokens` keeps (`deepscale.attention_share`; None = many,
    m = r). The feed-forward's half agrees with the profile that was shipped for 100 + 100 layers (0.39506 and 0.39516).
    Derived by us.
    """
    answer: dict[str, list[float]] = {}
    source = 0.0  # correlation of the encoder's output
    for stack in anatomy.stacks:
        r, s = r0[stack.name] * (1.0 - stack.embedding_dropout), 1.0 / (1.0 - stack.embedding_dropout)
        omega2: float = 1.0
        found = answer.setdefault(stack.name, [])
        for block in stack.blocks:
            for sub in block.sublayers:
                found.append(omega2**0.5)
                variance, correlation = _branch_moments(sub, r, s, source, tokens)
                total = omega2 * s + variance
                r, omega2, s = (omega2 * s * r + variance * correlation) / total, total, 1.0
        source = r
    return answer


def _branch_moments(sub: SubLayerParts, r: float, s: float, source: float, tokens: int | None) -> tuple[float, float]:
    """Variance of a branch after its dropout, and its token correlation."""
    keep, branch = 1.0 - sub.dropout, sub.branch
    if isinstance(branch, AttentionParts):
        share, common = attention_share(source if branch.cross else r, tokens, causal=branch.causal)
        gain = _gain(branch.value) * _gain(branch.output)
        return gain * share * (1.0 if branch.cross else s) / keep, keep * common / share
    from clearhead.signal.moments.activation import activation
    from clearhead.signal.moments.types import Moments

    hidden = activation(branch.activation, Moments.of(_gain(branch.gate or branch.up) * s, r))
    second, shared = hidden.second_moment, hidden.raw_covariance
    if branch.gate is not None:
        second, shared = second * _gain(branch.up) * s, shared * _gain(branch.up) * s * r
    second /= 1.0 - branch.dropout
    return _gain(branch.down) * second / keep, keep * shared / second


def _gain(matrix: Matrix) -> float:
    """fan_in times the mean square of the weights."""
    weight = matrix.weight().detach()
    return weight.shape[1] * float(weight.double().square().mean())
