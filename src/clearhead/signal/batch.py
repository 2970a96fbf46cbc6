"""What a user hands over as a batch, and how the model wants it: tokens, a dict, pixels, or a tuple of arguments.

Legend: b batch, t tokens, s tokens of the source.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.parts import Anatomy
from clearhead.errors import UserError
from clearhead.objectives.causal_lm import IGNORE

OURS = ("source", "tokens", "source_valid", "valid", "segments", "segment_types", "targets")


@dataclass(frozen=True, eq=False)
class Prepared:
    """A batch as the model is called with it."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    valid: dict[str, Tensor] = field(default_factory=dict)
    """Stack -> bool [b, t]: tokens that are no padding. A stack that is not named has no padding."""
    targets: Tensor | None = None
    """[b, t]: our models, what each place has to answer; -100 is ignored."""
    tokens: Tensor | None = None
    """[b, t]: what the decoder (or the only stack) reads, where that is token ids."""
    segments: Tensor | None = None
    streams: tuple[Tensor, ...] = ()
    """Activations that the user hands over in place of tokens; asked for their gradient: the first stream has one."""


def prepare(anatomy: Anatomy, batch: Any, valid: Tensor | None) -> Prepared:
    """Turn `batch` into a call, and check it. Raises `UserError`, one line, for a batch that cannot be measured."""
    device = next((p.device for p in anatomy.model.parameters()), torch.device("cpu"))
    batch = _moved(batch, device)
    tensors = [x for x in _tensors(batch)]
    if not tensors or any(x.numel() == 0 for x in tensors):
        raise UserError("measure: the batch is empty; expected at least one sequence of at least two tokens")
    if anatomy.family == "clearhead":
        prepared = _ours(anatomy, batch)
    elif isinstance(batch, Mapping):
        prepared = _named(anatomy, dict(batch))
    elif isinstance(batch, Tensor):
        prepared = _lone(anatomy, batch)
    elif isinstance(batch, tuple | list):
        prepared = Prepared(args=tuple(batch))
    else:
        raise UserError(f"measure: expected a tensor, a dict or a tuple as batch, got {type(batch).__name__}")
    if not any(stack.embeddings for stack in anatomy.stacks):
        prepared = _with_streams(prepared, anatomy.width)
    if valid is not None:
        prepared.valid[anatomy.stacks[-1].name] = valid.to(device).bool()
    for name, mask in prepared.valid.items():
        if int(mask.sum(dim=1).max()) < 2:
            raise UserError(
                f"measure: no sequence of the {name} has two tokens; correlations and attention need at least two"
            )
    return prepared


def _with_streams(prepared: Prepared, width: int) -> Prepared:
    streams = []

    def asked(x: Any) -> Any:
        if isinstance(x, Tensor) and x.is_floating_point() and x.dim() == 3 and x.shape[2] == width:
            x = x.detach().requires_grad_()
            streams.append(x)
        return x

    args = tuple(asked(x) for x in prepared.args)
    kwargs = {name: asked(x) for name, x in prepared.kwargs.items()}
    return replace(prepared, args=args, kwargs=kwargs, streams=tuple(streams))


def _ours(anatomy: Anatomy, batch: Any) -> Prepared:
    """Our models: tokens, or a dict with some of `OURS`."""
    if isinstance(batch, tuple | list):
        names = ("tokens",) if len(anatomy.stacks) == 1 else ("source", "tokens")
        if len(batch) != len(names):
            raise UserError(f"measure: expected {' and '.join(names)} as batch, got a tuple of {len(batch)}")
        batch = dict(zip(names, batch, strict=True))
    given = {"tokens": batch} if isinstance(batch, Tensor) else dict(batch)
    for name in given:
        if name not in OURS:
            raise UserError(f"measure: unknown name {name!r} in the batch; known: {', '.join(OURS)}")
    two = len(anatomy.stacks) == 2
    for name in ("source", "tokens") if two else ("tokens",):
        if name not in given:
            raise UserError(f"measure: the batch lacks {name!r}")
    _check_tokens(anatomy, 0 if two else -1, "source" if two else "tokens", given["source" if two else "tokens"])
    if two:
        _check_tokens(anatomy, -1, "tokens", given["tokens"])
    tokens, targets = given["tokens"], given.pop("targets", None)
    if targets is not None:
        if targets.shape != tokens.shape:
            raise UserError(f"measure: targets: expected the tokens' shape {_of(tokens)}, got {_of(targets)}")
        _check_ids(anatomy.head.shape[0] if anatomy.head else None, "targets", targets)
    valid = {}
    for name, stack in {"source_valid": anatomy.stacks[0].name, "valid": anatomy.stacks[-1].name}.items():
        if given.get(name) is not None:
            valid[stack] = given[name]
    if two and "decoder" not in valid and targets is not None:
        valid["decoder"] = targets != IGNORE
    positional = [given.pop(name) for name in ("source", "tokens") if name in given]
    return Prepared(
        args=tuple(positional),
        kwargs={name: value for name, value in given.items() if value is not None},
        valid=valid,
        targets=targets,
        tokens=tokens,
        segments=given.get("segments"),
    )


def _lone(anatomy: Anatomy, tensor: Tensor) -> Prepared:
    """One tensor: token ids, pixels, or the first argument."""
    parameters = inspect.signature(anatomy.model.forward).parameters
    name = "pixel_values" if tensor.is_floating_point() else "input_ids"
    if name in parameters:
        return _named(anatomy, {name: tensor})
    if not tensor.is_floating_point() and anatomy.stacks[-1].embeddings:
        _check_tokens(anatomy, -1, "tokens", tensor)
    return Prepared(args=(tensor,), tokens=None if tensor.is_floating_point() else tensor)


def _named(anatomy: Anatomy, batch: dict[str, Any]) -> Prepared:
    """A dict, as Hugging Face's models take it."""
    model, first, last = anatomy.model, anatomy.stacks[0].name, anatomy.stacks[-1].name
    config: Any = getattr(model, "config", None)
    two = len(anatomy.stacks) == 2 and getattr(config, "is_encoder_decoder", False)
    ids, written = batch.get("input_ids"), batch.get("decoder_input_ids")
    if ids is not None:
        _check_tokens(anatomy, 0, "input_ids", ids)
    if written is not None:
        _check_tokens(anatomy, -1, "decoder_input_ids", written)
    labels = batch.get("labels")
    if two and labels is None and written is None and batch.get("decoder_inputs_embeds") is None:
        raise UserError("measure: an encoder-decoder needs labels or decoder_input_ids in the batch")
    if labels is not None:
        _check_labels(anatomy, labels, written if two else ids, two)
    valid = {}
    for name, stack in (("attention_mask", first), ("decoder_attention_mask", last)):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2 and _fits(mask, ids if stack == first else written):
            valid[stack] = mask.bool()
    if isinstance(batch.get("src_key_padding_mask"), Tensor) and batch["src_key_padding_mask"].dtype == torch.bool:
        valid[first] = ~batch["src_key_padding_mask"]
    if two and last not in valid and labels is not None and written is None:
        valid[last] = labels != IGNORE
    if getattr(config, "use_cache", False) and "use_cache" in inspect.signature(model.forward).parameters:
        batch.setdefault("use_cache", False)
    return Prepared(kwargs=batch, valid=valid, tokens=written if two else ids)


def _fits(mask: Tensor, tokens: Tensor | None) -> bool:
    return tokens is None or mask.shape == tokens.shape


def _check_labels(anatomy: Anatomy, labels: Tensor, tokens: Tensor | None, two: bool) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return
    if labels.dim() == 2 and tokens is not None and labels.shape != tokens.shape:
        raise UserError(f"measure: labels: expected the shape of the tokens, {_of(tokens)}, got {_of(labels)}")
    head = anatomy.head
    if head is not None and head.shape[0] > 1 and (labels.dim() == 2 or two):
        _check_ids(head.shape[0], "labels", labels)


def _check_tokens(anatomy: Anatomy, stack: int, name: str, ids: Any) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        got = f"{ids.dtype} {_of(ids)}" if isinstance(ids, Tensor) else type(ids).__name__
        raise UserError(f"measure: {name}: expected token ids, integers [batch, tokens], got {got}")
    if ids.shape[1] < 2:
        raise UserError(
            f"measure: {name} holds sequences of a single token; correlations and attention need at least two"
        )
    table = next((part for part in anatomy.stacks[stack].embeddings if part.role == "token"), None)
    if table is not None and isinstance(table.module, nn.Embedding):
        _check_ids(table.module.num_embeddings, name, ids, ignored=False)


def _check_ids(size: int | None, name: str, ids: Tensor, *, ignored: bool = True) -> None:
    kept = ids[ids != IGNORE] if ignored else ids
    if size is None or not kept.numel():
        return
    low, high = (int(x) for x in kept.aminmax())
    if low < 0 or high >= size:
        wrong = low if low < 0 else high
        raise UserError(
            f"measure: {name} holds the id {wrong}, but the model's vocabulary has {size} (0 to {size - 1}); "
            f"use the tokenizer that belongs to the model"
        )


def _of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(tensor.shape)


def _tensors(batch: Any) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple | list) else ()
    return [x for value in values for x in _tensors(value)]


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch on the model's device; tensors that are there already are not copied."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {name: _moved(value, device) for name, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_moved(value, device) for value in batch)
    return batch
