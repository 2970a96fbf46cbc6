"""From attentions to blocks: which module is one layer, where its norms stand, how much dropout its branches have."""

from __future__ import annotations

import torch.nn as nn

from clearhead.anatomy import names
from clearhead.anatomy.feed_forward import find_feed_forward
from clearhead.anatomy.parts import AttentionParts, BlockParts, FeedForwardParts, Matrix, SubLayerParts
from clearhead.anatomy.rules import Rules
from clearhead.anatomy.search import below, is_norm

Branch = AttentionParts | FeedForwardParts


def group_by_block(model: nn.Module, attentions: list[AttentionParts], width: int) -> dict[str, list[AttentionParts]]:
    """Path of each block and its attentions, in order.

    A block is an element of the innermost list (nn.ModuleList, nn.Sequential) all of whose elements hold attention;
    where there is none, the smallest module that holds the attention and a feed-forward.
    """
    paths = [part.path for part in attentions]
    lists = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
        and len(module) > 0
        and all(any(below(inner, f"{path}.{index}") for inner in paths) for index in range(len(module)))
    ]
    grouped: dict[str, list[AttentionParts]] = {}
    for part in attentions:
        around = [path for path in lists if below(part.path, path)]
        if around:
            innermost = max(around, key=len)
            index = part.path[len(innermost) + 1 :].split(".")[0]
            block = f"{innermost}.{index}"
        else:
            block = _smallest(model, part, paths, width)
        grouped.setdefault(block, []).append(part)
    return grouped


def _smallest(model: nn.Module, part: AttentionParts, paths: list[str], width: int) -> str:
    scope = part.path
    while scope:
        scope = scope.rpartition(".")[0]
        if find_feed_forward(model, scope, paths, width, Rules(model)) is not None:
            return scope
    return part.path.rpartition(".")[0]


def describe_block(
    model: nn.Module, path: str, attentions: list[AttentionParts], width: int, rules: Rules, *, final_norm: bool
) -> BlockParts:
    """One layer with its branches: self-attention, cross attention, feed-forward."""
    block = model.get_submodule(path)
    feed_forward = find_feed_forward(model, path, [part.path for part in attentions], width, rules)
    ordered = sorted(attentions, key=lambda part: part.cross)
    branches: dict[str, Branch] = {("cross_attention" if part.cross else "attention"): part for part in ordered}
    if feed_forward is not None:
        branches["feed_forward"] = feed_forward
    else:
        rules.assume(f"{path}: no feed-forward was found in it")
    norms = _norms(model, path, branches, width)
    owners, behind = _assign(model, path, norms, branches, rules)

    placements: dict[str, str] = {}
    for part, norm in owners.items():
        told = _told_by_place(model, norm, branches[part])
        if told is not None:
            placements[part] = told
    if owners and len(placements) < len(owners):
        modules = [model.get_submodule(norm) for norm in owners.values()]
        usual = rules.placement(block, path, modules, [b.module for b in branches.values()], final_norm)
        placements = {part: placements.get(part, usual) for part in owners}

    parallel = rules.parallel(block)
    shared = owners.get("attention")
    if feed_forward is not None and "feed_forward" not in owners and shared is not None and not behind:
        owners["feed_forward"], placements["feed_forward"] = shared, placements["attention"]  # GPT-J, Phi, Cohere
        parallel = True
    sublayers = tuple(
        _sublayer(model, path, part, branch, owners.get(part), behind.get(part), placements.get(part, "pre"), rules)
        for part, branch in branches.items()
    )
    return BlockParts(block, path, sublayers, parallel)


def _norms(model: nn.Module, path: str, branches: dict[str, Branch], width: int) -> list[str]:
    """Norms of the stream inside a block: those of queries and keys left out."""
    of_heads = {
        id(norm)
        for branch in branches.values()
        if isinstance(branch, AttentionParts)
        for norm in (branch.query_norm, branch.key_norm)
        if norm is not None
    }
    found = []
    for name, module in model.get_submodule(path).named_modules():
        sizes = [p.shape[0] for p in module.parameters(recurse=False)]
        if is_norm(module) and id(module) not in of_heads and all(size == width for size in sizes):
            found.append(f"{path}.{name}" if path else name)
    return found


def _assign(
    model: nn.Module, path: str, norms: list[str], branches: dict[str, Branch], rules: Rules
) -> tuple[dict[str, str], dict[str, str]]:
    """(part -> path of its norm, part -> path of a further norm on what the branch answers)."""
    owners: dict[str, str] = {}
    behind: dict[str, str] = {}
    inner = {norm[len(path) + 1 :] if path else norm: norm for norm in norms}
    called = {names.plain(name): norm for name, norm in inner.items()}
    around_feed_forward = "postfeedforwardlayernorm" in called
    if around_feed_forward:  # Gemma 2 and 3; OLMo 2 has nothing in front of a branch
        for part, name in (("attention", "postattentionlayernorm"), ("feed_forward", "postfeedforwardlayernorm")):
            if part in branches and name in called:
                behind[part] = called.pop(name)
    left = []
    third = "cross_attention" in branches and any(name.endswith("3") for name in called)
    for name, norm in called.items():
        numbered = {"1": "attention", "2": "cross_attention", "3": "feed_forward"} if third else {}
        owner = numbered.get(name[-1]) or _inside_of(model, path, norm, branches) or _by_name(name, branches)
        if owner is not None and owner not in owners:
            owners[owner] = norm
        else:
            left.append(norm)
    free = [part for part in branches if part not in owners and part not in behind]
    if left and len(left) == len(free):
        for part, norm in zip(free, left, strict=True):
            owners[part] = norm
            rules.assume(f"{norm}: taken as the norm of {part} because of its order")
    return owners, behind


def _inside_of(model: nn.Module, path: str, norm: str, branches: dict[str, Branch]) -> str | None:
    """The one branch that the norm's parent module holds a matrix of, when that parent is not the block itself."""
    parent = norm.rpartition(".")[0]
    if parent == path or isinstance(model.get_submodule(parent), nn.ModuleList):
        return None
    held = [
        part
        for part, branch in branches.items()
        if any(below(matrix.path, parent) for matrix in _ends(branch)) or below(branch.path, parent)
    ]
    return held[0] if len(held) == 1 else None


def _ends(branch: Branch) -> tuple[Matrix, ...]:
    if isinstance(branch, AttentionParts):
        return branch.query, branch.output
    return branch.up, branch.down


def _by_name(name: str, branches: dict[str, Branch]) -> str | None:
    last = name.split(".")[-1]
    for part, table in (
        ("cross_attention", names.CROSS_NORM),
        ("attention", names.ATTENTION_NORM),
        ("feed_forward", names.FEED_FORWARD_NORM),
    ):
        if part in branches and (last in table or name in table):
            return part
    return None


def _told_by_place(model: nn.Module, norm: str, branch: Branch) -> str | None:
    """A norm in the module of the branch's last matrix alone is a post-norm (BERT), in that of its first a pre-norm."""
    parent = norm.rpartition(".")[0]
    first, last = _ends(branch)
    holds_first, holds_last = below(first.path, parent), below(last.path, parent)
    if holds_last and not holds_first:
        return "post"
    if holds_first and not holds_last:
        return "pre"
    return None


def _sublayer(
    model: nn.Module,
    path: str,
    part: str,
    branch: Branch,
    norm: str | None,
    behind: str | None,
    placement: str,
    rules: Rules,
) -> SubLayerParts:
    _, last = _ends(branch)
    adds = norm is not None and placement == "post" and _told_by_place(model, norm, branch) == "post"
    return SubLayerParts(
        part=part,
        branch=branch,
        norm=None if norm is None else model.get_submodule(norm),
        norm_path=norm,
        placement=placement,
        dropout=rules.branch_dropout(part, _dropout_places(model, path, branch, last)),
        residual_module=model.get_submodule(norm.rpartition(".")[0]) if adds and norm is not None else None,
        branch_norm=None if behind is None else model.get_submodule(behind),
        branch_norm_path=behind,
    )


def _dropout_places(model: nn.Module, block: str, branch: Branch, last: Matrix) -> list[nn.Module]:
    """Modules that may hold the dropout of a branch's answer, the innermost first.

    The holder of the queries is left out: what is called dropout there acts on the weights.
    """
    first, _ = _ends(branch)
    places = []
    scope = last.path.rpartition(".")[0]
    attention = isinstance(branch, AttentionParts)
    while True:
        inner_dropout = scope == first.path.rpartition(".")[0] and (attention or _wrapped(model, block, scope))
        module = model.get_submodule(scope)
        places.append(_Without(module, {"dropout"}) if inner_dropout and scope != block else module)
        if scope == block or not scope:
            return places  # type: ignore[return-value]
        scope = scope.rpartition(".")[0]


def _wrapped(model: nn.Module, block: str, scope: str) -> bool:
    wrapper = scope.rpartition(".")[0]
    return wrapper != block and len(wrapper) > len(block) and hasattr(model.get_submodule(wrapper), "dropout")


class _Without:
    """A module seen without some of its attributes."""

    def __init__(self, module: nn.Module, hidden: set[str]) -> None:
        self._module, self._hidden = module, hidden

    def __getattr__(self, name: str) -> object:
        if name in self._hidden:
            raise AttributeError(name)
        return getattr(self._module, name)
