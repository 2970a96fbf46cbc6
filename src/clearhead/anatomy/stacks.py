"""From blocks to stacks and the whole model: embeddings, the norms at the ends, the head."""

from __future__ import annotations

import torch.nn as nn

from clearhead.anatomy import names
from clearhead.anatomy.attention import find_attentions
from clearhead.anatomy.blocks import describe_block, group_by_block
from clearhead.anatomy.parts import Anatomy, AttentionParts, EmbeddingParts, Matrix, StackParts
from clearhead.anatomy.rules import Rules
from clearhead.anatomy.search import below, drop_rate, is_matrix, is_norm, join, matrix_of, unnamed

FINAL = {
    "lnf",
    "norm",
    "finallayernorm",
    "layernorm",
    "finalnorm",
    "postlayernorm",
    "lnpost",
    "fcnorm",
    "lastnorm",
    "normf",
}


def assemble(model: nn.Module, rules: Rules) -> Anatomy | None:
    """The anatomy of a model by its structure and a family's rules; None when it has no attention."""
    attentions = find_attentions(model, rules)
    if not attentions:
        return None
    width = attentions[0].output.shape[0]
    blocks = group_by_block(model, attentions, width)
    scopes: dict[str, list[str]] = {}
    for path in blocks:
        scopes.setdefault(path.rpartition(".")[0], []).append(path)
    taken: list[str] = []
    stacks = []
    for container, paths in scopes.items():
        stacks.append(_stack(model, container, paths, blocks, list(scopes), rules, taken))
    head = _head(model, list(scopes), width, rules)
    tables = {id(getattr(table.module, table.leaf)) for stack in stacks for table in stack.embeddings}
    return unnamed(
        Anatomy(
            model=model,
            family=rules.family,
            stacks=tuple(stacks),
            width=width,
            head=head,
            head_tied=head is not None and id(getattr(head.module, head.leaf)) in tables,
            head_scale=rules.head_scale(),
            notes=tuple(rules.notes),
        )
    )


def _stack(
    model: nn.Module,
    container: str,
    paths: list[str],
    blocks: dict[str, list[AttentionParts]],
    containers: list[str],
    rules: Rules,
    taken: list[str],
) -> StackParts:
    width = blocks[paths[0]][0].output.shape[0]
    others = [other for other in containers if other != container]
    scopes = _scopes(container, others)
    norms = _end_norms(model, container, scopes, containers, width)
    embedding_norm = next((path for path in norms if "emb" in path.lower()), None)
    final_norm = next((path for path in norms if path != embedding_norm and "emb" not in path.lower()), None)
    if rules.final_norm_is_embedding_norm():
        embedding_norm, final_norm = final_norm, None
    described = tuple(
        describe_block(model, path, blocks[path], width, rules, final_norm=final_norm is not None) for path in paths
    )
    cross = any(part.cross for path in paths for part in blocks[path])
    causal = any(part.causal for path in paths for part in blocks[path])
    name = "decoder" if cross or causal else "encoder"
    number = 2
    while name in taken:
        name, number = f"{name.rstrip('0123456789')}{number}", number + 1
    taken.append(name)
    tables = _tables(model, scopes, others, containers, width)
    token = next((table.module for table in tables if table.role == "token"), None)
    return StackParts(
        name=name,
        blocks=described,
        embeddings=tuple(tables),
        embedding_norm=None if embedding_norm is None else model.get_submodule(embedding_norm),
        embedding_norm_path=embedding_norm,
        embedding_dropout=_embedding_dropout(model, scopes),
        embedding_scale=rules.embedding_scale(model.get_submodule(container.rpartition(".")[0]), token),
        final_norm=None if final_norm is None else model.get_submodule(final_norm),
        final_norm_path=final_norm,
        batch_first=rules.batch_first(),
    )


def _scopes(container: str, others: list[str]) -> list[str]:
    """Modules around the blocks, the innermost first; where another stack lies in one too, it is the whole model's."""
    scopes = []
    scope = container
    while True:
        scope = scope.rpartition(".")[0]
        scopes.append(scope)
        if not scope:
            return scopes


def _outside(path: str, containers: list[str]) -> bool:
    return not any(below(path, container) for container in containers if container)


def _end_norms(model: nn.Module, container: str, scopes: list[str], containers: list[str], width: int) -> list[str]:
    """Norms beside the blocks, or one level down in a module of embeddings; the nearest first."""
    found = []
    for scope in scopes:
        shared = any(below(other, scope) for other in containers if other != container)
        for name, child in model.get_submodule(scope).named_modules():
            path = join(scope, name)
            if path in found or not is_norm(child) or not _outside(path, containers) or path == container:
                continue
            sizes = [p.shape[0] for p in child.parameters(recurse=False)]
            own = name.count(".") == 0 and names.plain(name.split(".")[-1]) in FINAL and all(n == width for n in sizes)
            embeds = "emb" in name.lower() and name.count(".") <= 1 and "position" not in name.lower()
            if (own or embeds) and not shared:
                found.append(path)
    return found


def _tables(
    model: nn.Module, scopes: list[str], others: list[str], containers: list[str], width: int
) -> list[EmbeddingParts]:
    """Tables around the blocks that belong to no other stack; the token table first."""
    foreign = [other.rpartition(".")[0] for other in others]
    mine = scopes[0]
    found: dict[int, EmbeddingParts] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if not _outside(path, containers) or not any(below(path, scope) for scope in scopes):
            continue
        elsewhere = any(scope and below(path, scope) and not below(path, mine) for scope in foreign)
        if elsewhere:
            continue
        if isinstance(module, nn.Embedding):
            role = _role(path)
            table = EmbeddingParts(module, path, "weight", role)
            if id(module.weight) not in {
                id(part.module.weight) for part in found.values() if hasattr(part.module, "weight")
            }:
                found[id(module)] = table
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 3 and parameter.shape[0] == 1 and parameter.shape[2] == width and "pos" in leaf:
                found[id(parameter)] = EmbeddingParts(module, path, leaf, "position")
    order = ("token", "position", "segment", "other")
    return sorted((t for t in found.values() if t.role != "other"), key=lambda table: order.index(table.role))


def _role(path: str) -> str:
    steps = path.lower().split(".")
    last = steps[-1] if not steps[-1].isdigit() else ".".join(steps[-2:])
    if "rel" in last:
        return "other"
    if any(word in last for word in names.SEGMENT_TABLE):
        return "segment"
    if any(word in last for word in names.POSITION_TABLE):
        return "position"
    return "token"


def _embedding_dropout(model: nn.Module, scopes: list[str]) -> float:
    wanted = (
        "drop",
        "embd_drop",
        "emb_dropout",
        "embed_dropout",
        "embedding_dropout",
        "pos_drop",
        "emb_drop",
        "dropout",
    )
    for scope in scopes:
        module = model.get_submodule(scope)
        inner = [child for name, child in module.named_children() if "emb" in name.lower()]
        for place in (*inner, module):
            for name in wanted:
                value = getattr(place, name, None)
                if isinstance(value, nn.Module | float | int) and not isinstance(value, bool):
                    return drop_rate(value)
    return 0.0


def _head(model: nn.Module, containers: list[str], width: int, rules: Rules) -> Matrix | None:
    module = rules.head()
    if module is not None:
        path = next((name for name, child in model.named_modules() if child is module), None)
        return None if path is None or not is_matrix(module) else matrix_of(module, path)
    for name in names.HEAD_MATRIX:
        for path, child in model.named_modules():
            fits = path == name or (path.endswith(f".{name}") and path.count(".") <= 1)
            if fits and is_matrix(child) and _outside(path, containers):
                matrix = matrix_of(child, path)
                if matrix.shape[1] == width:
                    return matrix
    return None
