"""What a competitor's module offers, and what it is given.

A module of `sources/` has a function for each operation that it serves, and gets the competitor's `option`:

    attention(option, problem) -> f(q, k, v) -> out        all [b, h, n, d]
    decode(option, problem)    -> f() -> out [b, h, 1, d]  puts one token in a cache, reads it, and forgets it again
    step(option, training)     -> Step

Everything that a real program would make once (masks, caches, buffers) is made before the function is returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.attention.selective import Temperatures
from clearhead.attention.spec import AttentionSpec, Learned, Performer
from clearhead.bench.plan import Model, Shape

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Problem:
    """The tensors of one attention, the same for everyone."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        dtype, device = getattr(torch, shape.dtype), torch.device(shape.device)

        def draw(length: int, width: int) -> Tensor:
            size = (shape.batch, shape.heads, length, width)
            return torch.randn(size, generator=generator).to(device, dtype)

        self.q, self.k, self.v, self.gradient = (draw(shape.length, shape.head_dim) for _ in range(4))
        # One for queries, one for values, one scalar a head: leaves, as what computes them would want their gradients.
        each = (*self.q.shape[:3], 1)
        sizes = {"query": each, "value": each, "scalar": (1, shape.heads, 1, 1)}
        self._taus = {
            name: (torch.rand(size, generator=generator) + 0.5).to(device).requires_grad_()
            for name, size in sizes.items()
        }

    def temperatures(self, option: str) -> dict[str, Tensor]:
        """The temperatures that a spec needs, given and not computed: float32, learned in a real layer."""
        spec = AttentionSpec.parse(option)
        if spec.temperature is None:
            return {}
        if isinstance(spec.temperature, Learned):
            return {"query": self._taus["scalar"]}
        on = ("value",) if isinstance(spec.weights, Performer) else ("query", "value")
        return {name: self._taus[name] for name in on}

    def last(self, temperatures: Mapping[str, Tensor]) -> Temperatures | None:
        """The same of the last token alone."""
        return Temperatures(**{name: t[:, :, -1:] for name, t in temperatures.items()}) if temperatures else None


@dataclass(frozen=True, eq=False)
class Step:
    """A training step of one model. `model` takes tokens [b, t] and answers logits [b, t, V]."""

    model: nn.Module
    run: Callable[[], object]
    embedding: Tensor
    """The token table, whose gradient is checked."""

    @property
    def parameters(self) -> int:
        """Numbers that are trained."""
        return sum({id(p): p.numel() for p in self.model.parameters()}.values())


class Training:
    """Tokens and weights of one training step, the same for everyone."""

    learning_rate = 1e-7
    """So small that a thousand steps on one batch leave the model as it is; AdamW's work does not depend on it."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model = model
        self.device = torch.device(model.device)
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        size = (model.batch_size, model.config.context + 1)
        tokens = torch.randint(0, 256, size, generator=generator).to(self.device)
        self.inputs, self.targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def decoder(self, spec: str, form: str) -> nn.Module:
        """Our decoder, as the config has it ("llama") or in GPT's form ("gpt")."""
        from dataclasses import replace

        from clearhead.models.decoder import Decoder

        changes: dict[str, Any] = (
            {"norm": "layer", "feed_forward": "gelu", "position": "learned"} if form == "gpt" else {}
        )
        made = Decoder(replace(self.model.config, attention=spec, **changes))
        made.init_parameters(self.seed)
        return made.to(self.device)


class SourceModule(Protocol):
    """See the top of this file; a module has those functions that its competitors' operations need."""

    attention: Callable[[str, Problem], Attend]
    decode: Callable[[str, Problem], Callable[[], Tensor]]
    step: Callable[[str, Training], Step]


def plain_step(model: nn.Module, training: Training, loss_of: Callable[[], Tensor]) -> Callable[[], object]:
    """The loop that everybody writes: loss, backward, clip, fused AdamW with decay on matrices alone."""
    optim = training.model.optim
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": optim.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=training.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        fused=True,
    )

    def run() -> object:
        loss = loss_of()
        loss.backward()
        if optim.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return run
