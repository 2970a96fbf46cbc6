"""Exact ways from scaled residual sums to plain ones: `fold_omega` (Admin) and `fold_rules` (hooks on other models)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.parts import Anatomy, AttentionParts, Matrix, StackParts, SubLayerParts
from clearhead.anatomy.search import is_norm
from clearhead.errors import UserError
from clearhead.init.foreign import RULE, BranchRule, HeadRule, StreamRule, branch_end, remove_rules
from clearhead.layers.gate import TokenGate
from clearhead.layers.position.sinusoidal import SinusoidalPosition
from clearhead.layers.residual import ConstantOmegaSum, OmegaSum, PlainSum


@torch.no_grad()
def fold_omega(model: nn.Module) -> nn.Module:
    """Turn omega x + f(x) into x + f(x) exactly, in place, and return the model, now a plain Post-LN one.

    Branch i reads x = gamma n + nu of the norm before it. That norm becomes omega_i gamma, omega_i nu, and every matrix
    of f_i that reads x loses the factor: its columns are divided by omega_i. Biases and the last norm stay; keys and
    values of cross attention read the encoder and stay. omega_1 goes into the embedding's norm, or into its tables, and
    then a tied output matrix gets weights of its own. The config's init becomes xavier, so what is saved is plain.

    Derived by us; the paper's appendix was not at hand. An optimizer sees other parameters, so
    fold when training is over.

    Raises `UserError` for a model without omega, an omega of 0, or fixed positions that omega_1 cannot be folded into.
    """
    from clearhead.anatomy.find import anatomy_of

    anatomy = anatomy_of(model)
    model, config = anatomy.model, getattr(anatomy.model, "config", None)
    rules = [sub.rule for sub in _sublayers(anatomy)]
    if anatomy.family != "clearhead" or not any(isinstance(rule, OmegaSum | ConstantOmegaSum) for rule in rules):
        raise UserError("fold_omega: expected a clearhead model with init=admin or admin_constant")
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise UserError("fold_omega: the parameters are sharded (DTensor); fold a whole model, as load_model gives it")
    untied = _fold(anatomy, lambda sub: sub.rule.omega)  # type: ignore[union-attr, arg-type, return-value]
    for module in list(model.modules()):
        if isinstance(getattr(module, "rule", None), OmegaSum | ConstantOmegaSum):
            module.rule = PlainSum()
    changes: dict[str, object] = {"init": "xavier", "embedding_norm": anatomy.stacks[0].embedding_norm is not None}
    if untied:
        changes["tie_embeddings"] = False
    for module in model.modules():  # the stacks of a seq2seq model hold the config too
        if getattr(module, "config", None) is config:
            module.config = dataclasses.replace(config, **changes)  # type: ignore[type-var, assignment]
    return model


@torch.no_grad()
def fold_rules(model: nn.Module) -> list[str]:
    """Multiply the rules that `init_` put on a Hugging Face model into its weights, and take them off.

    After that `save_pretrained` writes a model that computes the same without clearhead. A factor on a branch goes into
    its last matrix and bias (or the norm that ends it); a vector omega as in `fold_omega`; the factor before the head
    into the norm that the head reads, or else into an output matrix of its own. An optimizer sees other parameters, so
    fold when training is over. Returns what was done, a line each.

    Raises `UserError`, before anything was changed, where a rule cannot be folded exactly.
    """
    from clearhead.anatomy.find import anatomy_of

    anatomy = anatomy_of(model)
    model, done = anatomy.model, []
    vectors = [sub for sub in _sublayers(anatomy) if isinstance(_rule(sub.residual_module), StreamRule)]
    if vectors and len(vectors) != len(list(_sublayers(anatomy))):
        raise UserError("fold_rules: some residual sums have a vector omega and some have none")
    head = None if anatomy.head is None else anatomy.head.module
    norm = _norm_before_head(anatomy) if isinstance(_rule(head), HeadRule) else None
    if isinstance(_rule(head), HeadRule) and norm is None:
        raise UserError("fold_rules: the head reads no norm that could take its factor; keep the rules, or drop them")
    scaled = [sub for sub in _sublayers(anatomy) if isinstance(_rule(branch_end(sub)), BranchRule)]
    if any(sub.branch_norm is not None and _one_plus(sub.branch_norm) for sub in scaled) or _one_plus(norm):
        raise UserError("fold_rules: this norm multiplies by 1 + weight and cannot take a factor exactly")
    if vectors:
        _fold(anatomy, lambda sub: _rule(sub.residual_module).omega)  # type: ignore[union-attr, arg-type, return-value]
        done.append(f"{len(vectors)} vectors omega into the norms before them")
    for sub in scaled:
        end = branch_end(sub)
        scale = _rule(end).scale  # type: ignore[union-attr]
        for name in ("weight", "bias"):
            parameter = getattr(end, name, None)
            if parameter is not None:
                parameter.mul_(scale)
    if scaled:
        done.append(f"{len(scaled)} factors into the branches' last matrices")
    if norm is not None and head is not None:
        _scale_norm(norm, _rule(head).scale)  # type: ignore[union-attr, arg-type]
        done.append("the head's factor into the norm before it")
    remove_rules(model)
    return done


def _fold(anatomy: Anatomy, omega_of: Callable[[SubLayerParts], Tensor]) -> bool:
    """Fold the omegas of every sum; True when the output matrix was untied."""
    omegas = {id(sub): _wide(omega_of(sub)) for sub in _sublayers(anatomy)}
    if not all(bool((omega_w != 0.0).all()) for omega_w in omegas.values()):
        raise UserError("fold: an omega is 0, and its matrices would have to be divided by it")
    for stack in anatomy.stacks:
        _check_first(anatomy, stack, omegas[id(stack.blocks[0].sublayers[0])])
    untied = False
    for stack in anatomy.stacks:
        previous: SubLayerParts | None = None
        for block in stack.blocks:
            for sub in block.sublayers:
                omega_w = omegas[id(sub)]
                if previous is not None:
                    _scale_norm(previous.norm, omega_w)
                elif not bool((omega_w == 1.0).all()):
                    untied |= _scale_embedding(anatomy, stack, omega_w)
                for matrix in _readers(sub):
                    weight = matrix.weight().detach()
                    matrix.write((_wide(weight) / omega_w).to(weight.dtype))
                for module in sub.branch.module.modules():
                    if isinstance(module, TokenGate):
                        module.projection.weight.div_(omega_w.to(module.projection.weight.dtype))
                previous = sub
    return untied


def _sublayers(anatomy: Anatomy) -> Iterator[SubLayerParts]:
    for stack in anatomy.stacks:
        for block in stack.blocks:
            yield from block.sublayers


def _readers(sub: SubLayerParts) -> Iterator[Matrix]:
    """The matrices of a branch that read the stream."""
    branch = sub.branch
    if isinstance(branch, AttentionParts):
        yield branch.query
        if not branch.cross:
            yield branch.key
            yield branch.value
    else:
        yield branch.up
        if branch.gate is not None:
            yield branch.gate


def _check_first(anatomy: Anatomy, stack: StackParts, omega_w: Tensor) -> None:
    if stack.embedding_norm is not None or bool((omega_w == 1.0).all()):
        return
    if any(isinstance(module, SinusoidalPosition) for module in anatomy.model.modules()):
        raise UserError(
            "fold: the first omega goes into the embedding, and sinusoidal positions have no weights to take it; "
            "build the model with embedding_norm=true"
        )
    if not stack.embeddings:
        raise UserError(f"fold: the {stack.name} has no embedding that could take its first omega")
    others = {id(t.module.weight) for s in anatomy.stacks if s is not stack for t in s.embeddings}
    if any(id(table.module.weight) in others for table in stack.embeddings):
        raise UserError(
            "fold: encoder and decoder share a token table, which cannot take both first omegas; build the model with "
            "embedding_norm=true or share_embeddings=false"
        )


def _scale_embedding(anatomy: Anatomy, stack: StackParts, omega_w: Tensor) -> bool:
    """Put omega_1 into the embedding; True when the output matrix had to be untied."""
    if stack.embedding_norm is not None:
        _scale_norm(stack.embedding_norm, omega_w)
        return False
    tables = [getattr(table.module, table.leaf) for table in stack.embeddings]
    head, untied = anatomy.head, False
    if head is not None and any(getattr(head.module, head.leaf) is table for table in tables):
        head.module.register_parameter(head.leaf, nn.Parameter(getattr(head.module, head.leaf).detach().clone()))
        untied = True
    for table in tables:
        table.mul_(omega_w.to(table.dtype))
    return untied


def _scale_norm(norm: nn.Module | None, factor: Tensor) -> None:
    if norm is None or getattr(norm, "weight", None) is None:
        raise UserError("fold: a norm without a weight cannot take a factor")
    for name in ("weight", "bias"):
        parameter = getattr(norm, name, None)
        if parameter is not None:
            parameter.mul_(factor.to(parameter.dtype))


def _norm_before_head(anatomy: Anatomy) -> nn.Module | None:
    """The norm whose output the head reads: the last stack's, or the one in BERT's masked-LM head."""
    assert anatomy.head is not None
    parent = anatomy.model.get_submodule(anatomy.head.path.rpartition(".")[0])
    inner = [module for module in parent.modules() if is_norm(module)]
    if parent is not anatomy.model and len(inner) == 1:
        return inner[0]
    return anatomy.stacks[-1].final_norm


def _rule(module: nn.Module | None) -> nn.Module | None:
    return None if module is None else module._modules.get(RULE)


def _one_plus(norm: nn.Module | None) -> bool:
    return norm is not None and type(norm).__name__.startswith("Gemma")


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))
