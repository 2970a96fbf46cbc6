"""Finding the feed-forward of a block: matrices up and down (and gate) outside its attentions."""

from __future__ import annotations

import torch.nn as nn

from clearhead.anatomy import names
from clearhead.anatomy.parts import FeedForwardParts, Matrix
from clearhead.anatomy.rules import Rules
from clearhead.anatomy.search import activation_name, below, is_matrix, join, matrix_of

ACTIVATIONS = (
    "activation_fn", "act_fn", "act", "activation", "intermediate_act_fn", "hidden_act", "act_func", "gelu_impl",
    "nonlin", "non_linearity", "activation_function", "gelu", "relu", "silu",
)  # fmt: skip


def find_feed_forward(
    model: nn.Module, block: str, attentions: list[str], width: int, rules: Rules
) -> FeedForwardParts | None:
    """The feed-forward of `block`, or None: matrices are known by their names, then by their sizes."""
    module = model.get_submodule(block)
    linears = {
        name: matrix_of(child, join(block, name))
        for name, child in module.named_modules()
        if is_matrix(child) and not any(below(join(block, name), path) for path in attentions)
    }
    downs = {name: m for name, m in linears.items() if m.shape[0] == width}
    named = {name: m for name, m in downs.items() if _called(name, names.DOWN)}
    reading = {name: m for name, m in linears.items() if m.shape[1] == width}
    for down_name, down in [*named.items(), *((n, m) for n, m in downs.items() if n not in named)]:
        hidden = down.shape[1]
        ups = {name: m for name, m in reading.items() if m.shape[0] == hidden and name != down_name}
        fused = {name: m for name, m in reading.items() if m.shape[0] == 2 * hidden and name != down_name}
        if not ups and not fused:
            continue
        return _describe(model, block, ups, fused, down_name, down, rules)
    return None


def _called(name: str, table: set[str]) -> bool:
    """Whether the last step of a dotted name, or the last two, stand in a table."""
    steps = [names.plain(step) for step in name.split(".")]
    return steps[-1] in table or ".".join(steps[-2:]) in table


def _describe(
    model: nn.Module,
    block: str,
    ups: dict[str, Matrix],
    fused: dict[str, Matrix],
    down_name: str,
    down: Matrix,
    rules: Rules,
) -> FeedForwardParts:
    gate: Matrix | None = None
    if not ups:
        name, whole = next(iter(fused.items()))
        half = whole.shape[0] // 2
        gate = matrix_of(whole.module, whole.path, rows=(0, half))
        up = matrix_of(whole.module, whole.path, rows=(half, 2 * half))
        used = [name, down_name]
    elif len(ups) == 1:
        ((name, up),) = ups.items()
        used = [name, down_name]
    else:
        gates = [name for name in ups if _called(name, names.GATE)]
        if not gates:
            gates = [next(iter(ups))]
            rules.assume(f"{join(block, gates[0])}: taken as the gate because it comes first")
        gate = ups.pop(gates[0])
        name, up = next(iter(ups.items()))
        used = [gates[0], name, down_name]
    core = join(block, _common(used))
    path = core if core != block else block
    module = model.get_submodule(path)
    return FeedForwardParts(
        module=module,
        path=path,
        activation=_activation(model, block, path, rules),
        up=up,
        down=down,
        gate=gate,
        dropout=rules.hidden_dropout(module, inner=_wrapped(model, block, path)),
    )


def _wrapped(model: nn.Module, block: str, path: str) -> bool:
    """Whether a module between the feed-forward and its block has a dropout of its own (T5)."""
    wrapper = path.rpartition(".")[0]
    return wrapper != block and len(wrapper) > len(block) and hasattr(model.get_submodule(wrapper), "dropout")


def _common(paths: list[str]) -> str:
    """The longest dotted path that all of `paths` lie strictly below."""
    steps = [path.split(".")[:-1] for path in paths]
    common = []
    for level in zip(*steps, strict=False):
        if len(set(level)) > 1:
            break
        common.append(level[0])
    return ".".join(common)


def _activation(model: nn.Module, block: str, path: str, rules: Rules) -> str:
    places = [model.get_submodule(path), *model.get_submodule(path).children(), model.get_submodule(block)]
    for place in places:
        for attribute in ACTIVATIONS:
            found = activation_name(getattr(place, attribute, None))
            if found is not None and found != "identity":
                return found
    for child in model.get_submodule(path).modules():  # an nn.GELU in an nn.Sequential
        if not any(True for _ in child.parameters()) and type(child).__module__ == nn.ReLU.__module__:
            found = activation_name(child)
            if found is not None and found != "identity":
                return found
    configured = getattr(rules.config, "hidden_act", None) or getattr(rules.config, "activation_function", None)
    rules.assume(f"the activation of {path or 'the feed-forward'} was not found; named {configured or 'unknown'}")
    return str(configured or "unknown")
