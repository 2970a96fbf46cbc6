"""Start values of a model's parameters: a plan that names each parameter once, and the seeded draws that fill it.

Each parameter is drawn by its own generator, seeded by (seed, parameter name). Models that share a parameter's name and
shape therefore start equal in it, whatever else differs between them.

    scheme     matrices                    writers into the stream           embeddings
    standard   N(0, 0.02)                  N(0, 0.02 / sqrt(2 layers))       N(0, 0.02)
    xavier     U(+-sqrt(6/(in + out)))     the same as other matrices        N(0, 1/sqrt(width))
    small      N(0, sqrt(2/(5 width)))     N(0, 2 / (layers sqrt(width)))    N(0, sqrt(2/(5 width)))

standard is GPT-2's. small is the "SmallInit" of Nguyen and Salazar (arXiv 1910.05895) with the output matrices
of GPT-NeoX-20B (arXiv 2204.06745). Norms start at weight 1 and bias 0; temperatures and gates state
their own start. A tied output matrix is the embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.errors import unknown


@dataclass(frozen=True)
class Draw:
    """How one parameter starts. `scale` is the value of constant, the std of normal, the limit of uniform; "kept"
    leaves the parameter as it is."""

    kind: str
    scale: float

    def __str__(self) -> str:
        form = {"constant": "{:g}", "normal": "N(0, {:.4g})", "uniform": "U(+-{:.4g})", "kept": "kept"}[self.kind]
        return form.format(self.scale)

    @property
    def mean(self) -> float:
        """Of the entries; NaN for what is kept."""
        return {"constant": self.scale, "kept": math.nan}.get(self.kind, 0.0)

    @property
    def variance(self) -> float:
        """Of the entries about their mean; NaN for what is kept."""
        kinds = {"constant": 0.0, "normal": self.scale**2, "uniform": self.scale**2 / 3.0, "kept": math.nan}
        return kinds[self.kind]

    def values(self, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
        """The start of a parameter of that shape, on the CPU in fp32."""
        if self.kind == "constant":
            return torch.full(shape, self.scale)
        start = torch.zeros(shape, dtype=torch.float32)
        if self.kind == "normal":
            return start.normal_(0.0, self.scale, generator=generator)
        return start.uniform_(-self.scale, self.scale, generator=generator)

    def fill(self, parameter: Tensor, generator: torch.Generator) -> None:
        """Write the start value, drawn on the CPU in fp32 so that every device and dtype starts alike.

        A sharded parameter (FSDP2's DTensor) gets its part of the same values: every process draws all of them.
        """
        if self.kind == "constant":
            parameter.fill_(self.scale)
        elif self.kind != "kept":
            parameter.copy_(_placed(self.values(tuple(parameter.shape), generator), parameter))


def constant(value: float) -> Draw:
    """Every entry is `value`."""
    return Draw("constant", value)


def normal(std: float) -> Draw:
    """Independent normal entries of mean 0."""
    return Draw("normal", std)


@dataclass(frozen=True)
class Scheme:
    """Draws for the three kinds of matrices, from (weight shape [out, in], width, layers)."""

    matrix: Callable[[torch.Size, int, int], Draw]
    writer: Callable[[torch.Size, int, int], Draw]
    embedding: Callable[[torch.Size, int, int], Draw]


def _xavier(shape: torch.Size, width: int, layers: int) -> Draw:
    return Draw("uniform", math.sqrt(6.0 / (shape[0] + shape[1])))


def _small(shape: torch.Size, width: int, layers: int) -> Draw:
    return normal(math.sqrt(2.0 / (5.0 * width)))


SCHEMES: dict[str, Scheme] = {
    "standard": Scheme(
        matrix=lambda shape, width, layers: normal(0.02),
        writer=lambda shape, width, layers: normal(0.02 / math.sqrt(2 * layers)),
        embedding=lambda shape, width, layers: normal(0.02),
    ),
    "xavier": Scheme(
        matrix=_xavier,
        writer=_xavier,
        embedding=lambda shape, width, layers: normal(width**-0.5),
    ),
    "small": Scheme(
        matrix=_small,
        writer=lambda shape, width, layers: normal(2.0 / (layers * math.sqrt(width))),
        embedding=_small,
    ),
}


def start_plan(model: nn.Module, scheme: str, *, width: int, layers: int) -> dict[str, Draw]:
    """Name every parameter of `model` once with its draw.

    A module may claim its own parameters by `start_values() -> {name: constant or Draw}`, and names the matrix that
    writes into the residual stream by `branch_output`. Raises `UserError` for an unknown scheme and `ValueError` for a
    parameter that no rule covers.
    """
    if scheme not in SCHEMES:
        raise unknown("init", scheme, SCHEMES)
    rules = SCHEMES[scheme]
    modules = dict(model.named_modules())
    claimed: dict[str, Draw] = {}
    writers: set[str] = set()
    for path, module in modules.items():
        start_values = getattr(module, "start_values", None)
        if start_values is not None:
            for name, value in start_values().items():
                claimed[_join(path, name)] = value if isinstance(value, Draw) else constant(value)
        if hasattr(module, "branch_output"):
            writers.add(_join(path, module.branch_output))

    plan: dict[str, Draw] = {}
    for name, parameter in model.named_parameters():  # a tied parameter appears once, under its first name
        path, _, leaf = name.rpartition(".")
        module = modules[path]
        if name in claimed:
            plan[name] = claimed[name]
        elif isinstance(module, nn.Linear):
            if leaf == "bias":
                plan[name] = constant(0.0)
            else:
                rule = rules.writer if path in writers else rules.matrix
                plan[name] = rule(parameter.shape, width, layers)
        elif isinstance(module, nn.Embedding):
            plan[name] = rules.embedding(parameter.shape, width, layers)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm):
            plan[name] = constant(0.0 if leaf == "bias" else 1.0)
        else:
            raise ValueError(f"init: no rule for {name} in {type(module).__name__}; give the module start_values()")
    return plan


def draw_parameters(model: nn.Module, plan: dict[str, Draw], seed: int) -> None:
    """Fill every parameter as `plan` says. Parameters on the meta device are left alone."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_meta:
                plan[name].fill(parameter, torch.Generator().manual_seed(parameter_seed(seed, name)))


def parameter_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one parameter, the same in every process (Python's own `hash` of a string is not)."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _placed(start: Tensor, parameter: Tensor) -> Tensor:
    """`start` sharded as `parameter` is, if it is."""
    mesh = getattr(parameter, "device_mesh", None)
    if mesh is None:
        return start
    from torch.distributed.tensor import distribute_tensor

    placements = parameter.placements  # type: ignore[attr-defined]
    start = start.to(parameter.device, parameter.dtype)
    return distribute_tensor(start, mesh, placements, src_data_rank=None)  # each takes its part, nothing is sent


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
