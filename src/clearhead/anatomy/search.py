"""Small questions about modules, which every recogniser asks: is it a norm, which activation, how much dropout."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from clearhead.anatomy.parts import Anatomy, AttentionParts, FeedForwardParts, Matrix

KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: F.relu(x).square(),
    "tanh": torch.tanh,
    "identity": lambda x: x,
}


def is_norm(module: nn.Module | None) -> bool:
    """Whether the module normalises features: by its class name, and by having at most vectors as parameters."""
    return (
        module is not None
        and "norm" in type(module).__name__.lower()
        and "batch" not in type(module).__name__.lower()
        and all(p.dim() <= 1 for p in module.parameters())
        and not any(module.children())
    )


def is_matrix(module: nn.Module | None) -> bool:
    """Whether the module is a linear map with a matrix of its own: nn.Linear or Hugging Face's Conv1D."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def matrix_of(module: nn.Module, path: str, **parts: Any) -> Matrix:
    """The `Matrix` of a module for which `is_matrix` holds."""
    return Matrix(
        module,
        path,
        bias_leaf="bias" if getattr(module, "bias", None) is not None else None,
        transposed=type(module).__name__ == "Conv1D",
        **parts,
    )


def activation_name(function: Any) -> str | None:
    """The name of an elementwise function, found by calling it on a few numbers; None when it is not one.

    A function that is none of `KNOWN` is named by its class or its own name.
    """
    if not callable(function) or isinstance(function, nn.Dropout | type):
        return None
    x = torch.linspace(-3.0, 3.0, 25, device="cpu")  # also while a model is built on the meta device
    try:
        with torch.no_grad():
            y = function(x)
    except Exception:  # whatever it is, it is no elementwise function of one tensor
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape:
        return None
    for name, known in KNOWN.items():
        if torch.allclose(y.float(), known(x), rtol=1e-5, atol=1e-6):
            return name
    return getattr(function, "__name__", type(function).__name__)


def drop_rate(value: Any) -> float:
    """The rate of a dropout module or of a plain number; 0 for anything else."""
    if isinstance(value, nn.Module):
        value = getattr(value, "p", 0.0)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else 0.0


def below(path: str, scope: str) -> bool:
    """Whether the dotted `path` is `scope` or lies below it; everything lies below ""."""
    return scope == "" or path == scope or path.startswith(scope + ".")


def join(scope: str, name: str) -> str:
    """The dotted path of `name` in `scope`."""
    return f"{scope}.{name}" if scope and name else scope or name


def unnamed(anatomy: Anatomy) -> Anatomy:
    """The anatomy with `unknown` filled: the parameters that none of its parts names."""
    named = {id(parameter) for parameter in _parameters(anatomy)}
    unknown = tuple(name for name, p in anatomy.model.named_parameters() if id(p) not in named)
    return dataclasses.replace(anatomy, unknown=unknown)


def _parameters(anatomy: Anatomy) -> Iterator[nn.Parameter]:
    matrices = [] if anatomy.head is None else [anatomy.head]
    modules: list[nn.Module | None] = []
    for stack in anatomy.stacks:
        modules += [stack.embedding_norm, stack.final_norm]
        for table in stack.embeddings:
            yield getattr(table.module, table.leaf)
        for block in stack.blocks:
            for sub in block.sublayers:
                modules += [sub.norm, sub.branch_norm, sub.rule]
                if isinstance(sub.branch, AttentionParts):
                    modules += [sub.branch.query_norm, sub.branch.key_norm]
                matrices += matrices_of(sub.branch).values()
    for matrix in matrices:
        yield getattr(matrix.module, matrix.leaf)
        if matrix.bias_name is not None and matrix.bias_leaf is not None:
            yield getattr(matrix.module, matrix.bias_leaf)
    for module in modules:
        if module is not None:
            yield from module.parameters()


def matrices_of(branch: AttentionParts | FeedForwardParts) -> dict[str, Matrix]:
    """The matrices of a branch by their role, in the order of the computation."""
    if isinstance(branch, AttentionParts):
        return {"query": branch.query, "key": branch.key, "value": branch.value, "output": branch.output}
    gate = {} if branch.gate is None else {"gate": branch.gate}
    return {**gate, "up": branch.up, "down": branch.down}
