"""The scalar whose gradient is measured, and how it was come by.

Legend: b batch, t tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from clearhead.anatomy.parts import Anatomy
from clearhead.errors import UserError
from clearhead.objectives.causal_lm import IGNORE, causal_lm_loss
from clearhead.signal.batch import Prepared

RANDOM = "random"


def loss_of(
    anatomy: Anatomy,
    output: Any,
    prepared: Prepared,
    batch: Any,
    loss: Callable[[Any, Any], Tensor] | None,
    generator: torch.Generator,
) -> tuple[Tensor, str]:
    """Return (scalar, where it comes from): the first of these that there is.

    - "callable": `loss(output, batch)`, the user's;
    - "output": `output.loss`, which a Hugging Face model gives when the batch has labels;
    - "targets": our models, cross-entropy at the targets, mean over those that count;
    - "next token": causal token models with a head, mean over valid tokens;
    - "random": sum of output times iid standard normal numbers, on valid tokens.
    """
    if loss is not None:
        value = loss(output, batch)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise UserError("measure: loss(output, batch) must return a tensor of one number")
        return value.reshape(()), "callable"
    given = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(given, Tensor) and given.numel() == 1:
        return given.reshape(()), "output"
    answer = main_output(output)
    targets, kind = prepared.targets, "targets"
    if targets is None and _predicts_next(anatomy, answer, prepared):
        targets, kind = _next_tokens(anatomy, prepared), "next token"
    if targets is not None:
        total, count = causal_lm_loss(answer, targets)
        if int(count) == 0:
            raise UserError("measure: every target is ignored (-100); there is nothing to predict")
        return total / count, kind
    draw = torch.randn(answer.shape, generator=generator, dtype=torch.float32).to(answer.device)
    valid = prepared.valid.get(anatomy.stacks[-1].name)
    if valid is not None and answer.shape[:2] == valid.shape:
        draw = draw * valid.reshape(*valid.shape, *(1,) * (answer.dim() - 2))
    return (answer.to(torch.promote_types(answer.dtype, torch.float32)) * draw).sum(), RANDOM


def main_output(output: Any) -> Tensor:
    """Logits, the last hidden state, or the first floating point tensor of whatever a model answers."""
    for name in ("logits", "last_hidden_state"):
        value = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if isinstance(value, Tensor):
            return value
    values = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple | list) else [output]
    )
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise UserError(f"measure: found no tensor to take a gradient of in the model's {type(output).__name__}")


def _predicts_next(anatomy: Anatomy, answer: Tensor, prepared: Prepared) -> bool:
    tokens, head, last = prepared.tokens, anatomy.head, anatomy.stacks[-1]
    return (
        tokens is not None
        and head is not None
        and last.name == "decoder"
        and answer.dim() == 3
        and answer.shape[:2] == tokens.shape
        and answer.shape[2] == head.shape[0]
        and int(tokens.max()) < head.shape[0]
    )


def _next_tokens(anatomy: Anatomy, prepared: Prepared) -> Tensor:
    """[b, t]: the next token of the same document; -100 at the last one and at padding."""
    tokens, valid = prepared.tokens, prepared.valid.get(anatomy.stacks[-1].name)
    assert tokens is not None
    targets = torch.full_like(tokens, IGNORE, dtype=torch.int64)
    targets[:, :-1] = tokens[:, 1:]
    for marks in (valid, prepared.segments):
        if marks is not None:
            targets[:, :-1][marks[:, 1:] != marks[:, :-1]] = IGNORE
    if valid is not None:
        targets[~valid] = IGNORE
    return targets
