"""Finding attentions: a module with matrices for query, key and value, or with one for all three, and an output.

A *holder* is the module that holds the query matrix; the *core* is the smallest module that holds all matrices of the
attention (in BERT `attention`, whose `self` is the holder).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn as nn

from clearhead.anatomy import names
from clearhead.anatomy.parts import AttentionParts, Matrix
from clearhead.anatomy.rules import Rules
from clearhead.anatomy.search import is_matrix, is_norm, join, matrix_of


@dataclass(frozen=True, eq=False)
class Found:
    """Matrices of one attention before its numbers are known; a fused matrix stands in several places."""

    core: str
    holder: str
    query: str
    key: str
    value: str
    output: str


def find_attentions(model: nn.Module, rules: Rules) -> list[AttentionParts]:
    """Every attention of the model, in the order of its modules."""
    found: list[AttentionParts] = []
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            found.append(_multi_head(module, path, rules, _around(model, path)))
            continue
        parts = look_into(model, path, module)
        if parts is not None:
            found.append(_describe(model, parts, rules))
    return found


def _around(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules that a path leads through, the innermost first, without itself."""
    around = []
    while path:
        path = path.rpartition(".")[0]
        around.append(model.get_submodule(path))
    return around


def look_into(model: nn.Module, path: str, module: nn.Module) -> Found | None:
    """The matrices of the attention whose query matrix is a child of `module`; None when it holds none."""
    inside = {names.plain(name): name for name, child in module.named_children() if is_matrix(child)}

    def first(table: set[str]) -> str | None:
        return next((join(path, original) for name, original in inside.items() if name in table), None)

    query, key, value = first(names.QUERY), first(names.KEY), first(names.VALUE)
    fused = first(names.FUSED)
    if query is not None and key is not None and value is not None:
        pass
    elif query is not None and first(names.FUSED_KEY_VALUE) is not None:  # cross attention of GPT-2
        key = value = first(names.FUSED_KEY_VALUE)
    elif fused is not None and not _state_space(module):
        query = key = value = fused
    else:
        return None
    assert query is not None
    assert key is not None
    assert value is not None
    output = _output(model, path, {query, key, value})
    if output is None:
        return None
    core = path if output.startswith(f"{path}." if path else "") else path.rpartition(".")[0]
    return Found(core, path, query, key, value, output)


def _state_space(module: nn.Module) -> bool:
    """Whether a module mixes as Mamba does: `in_proj` and `out_proj` as attention has them, and a convolution."""
    return any(isinstance(child, nn.Conv1d) for child in module.children())


def _output(model: nn.Module, path: str, taken: set[str]) -> str | None:
    """The matrix that answers: in the holder, one level down in it, or beside it."""
    for scope in (path, path.rpartition(".")[0]) if path else (path,):
        candidates = [
            name
            for name, module in model.get_submodule(scope).named_modules()
            if is_matrix(module) and join(scope, name) not in taken and name.count(".") <= 1
        ]
        named = [name for name in candidates if names.plain(name) in names.ATTENTION_OUTPUT]
        if named:
            return join(scope, named[0])
        if scope == path and len(candidates) == 1:
            return join(scope, candidates[0])
    return None


def _describe(model: nn.Module, found: Found, rules: Rules) -> AttentionParts:
    holder, around = model.get_submodule(found.holder), _around(model, found.holder)
    output = matrix_of(model.get_submodule(found.output), found.output)
    whole = matrix_of(model.get_submodule(found.query), found.query)
    heads = rules.head_count(holder, around)
    head_dim = next((n for name in names.HEAD_DIM if isinstance(n := getattr(holder, name, None), int) and n > 0), None)
    inner = output.shape[1]
    if head_dim is None and heads is None:
        rules.assume(f"nothing says how many heads {found.core} has; taken as 1")
        heads = 1
    if head_dim is None:
        assert heads is not None
        head_dim = inner // heads
    heads = inner // head_dim
    if found.query == found.key:
        query, key, value = _split(whole, heads, head_dim, rules, holder, found, around)
    elif found.key == found.value:
        query = whole
        key, value = _halves(matrix_of(model.get_submodule(found.key), found.key))
    else:
        query = whole
        key = matrix_of(model.get_submodule(found.key), found.key)
        value = matrix_of(model.get_submodule(found.value), found.value)
    cross = any(name in names.plain(found.core) for name in names.CROSS)
    norms = {names.plain(name): child for name, child in holder.named_children() if is_norm(child)}
    query_norm = next((norm for name, norm in norms.items() if name.startswith("q")), None)
    key_norm = next((norm for name, norm in norms.items() if name.startswith("k")), None)
    return AttentionParts(
        module=model.get_submodule(found.core),
        path=found.core,
        query=query,
        key=key,
        value=value,
        output=output,
        heads=heads,
        kv_heads=key.shape[0] // head_dim,
        head_dim=head_dim,
        causal=not cross and rules.causal(holder, around),
        cross=cross,
        scale=rules.scale(holder, head_dim),
        dropout=rules.weight_dropout(holder),
        rope_base=None if cross else rules.rope_base(holder),
        query_norm=query_norm,
        key_norm=key_norm,
    )


def _split(
    whole: Matrix,
    heads: int,
    head_dim: int,
    rules: Rules,
    holder: nn.Module,
    found: Found,
    around: list[nn.Module],
) -> tuple[Matrix, Matrix, Matrix]:
    """The three parts of a fused matrix."""
    rows, wide = whole.shape[0], heads * head_dim
    groups = (rows - wide) // (2 * head_dim)
    layout = rules.interleaved(holder, found.holder)

    def part(**place: object) -> Matrix:
        return matrix_of(whole.module, whole.path, **place)

    if layout == "heads" and groups == heads:
        return tuple(part(interleaved=(heads, 3, index)) for index in range(3))  # type: ignore[return-value]
    if layout == "groups":
        each = heads // groups
        return (
            part(interleaved=(groups, each + 2, 0), span=each),
            part(interleaved=(groups, each + 2, each)),
            part(interleaved=(groups, each + 2, each + 1)),
        )
    if layout == "fours":
        query, value, key = (part(interleaved=(4, 3, index)) for index in range(3))
        return query, key, value
    narrow = (rows - wide) // 2
    return (
        part(rows=(0, wide)),
        part(rows=(wide, wide + narrow)),
        part(rows=(wide + narrow, rows)),
    )


def _halves(whole: Matrix) -> tuple[Matrix, Matrix]:
    rows = whole.shape[0]
    first = matrix_of(whole.module, whole.path, rows=(0, rows // 2))
    return first, matrix_of(whole.module, whole.path, rows=(rows // 2, rows))


def _multi_head(module: nn.MultiheadAttention, path: str, rules: Rules, around: list[nn.Module]) -> AttentionParts:
    width = module.embed_dim
    bias = None if module.in_proj_bias is None else "in_proj_bias"
    if module.in_proj_weight is not None:
        parts = [
            Matrix(module, path, leaf="in_proj_weight", bias_leaf=bias, rows=(i * width, (i + 1) * width))
            for i in range(3)
        ]
    else:
        parts = [Matrix(module, path, leaf=f"{name}_proj_weight", bias_leaf=None) for name in "qkv"]
        if bias is not None:
            rules.assume(f"{path}: the bias of separate query, key and value matrices is not described")
    cross = any(name in names.plain(path) for name in names.CROSS)
    return AttentionParts(
        module=module,
        path=path,
        query=parts[0],
        key=parts[1],
        value=parts[2],
        output=matrix_of(module.out_proj, join(path, "out_proj")),
        heads=module.num_heads,
        kv_heads=module.num_heads,
        head_dim=module.head_dim,
        causal=not cross and rules.causal(module, around),
        cross=cross,
        dropout=module.dropout,
        rope_base=None,
    )
