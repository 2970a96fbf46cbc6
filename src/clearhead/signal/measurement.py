"""`measure`: what happens inside a model on a batch, by hooks, without touching the model.

Legend: b batch, t tokens, w width.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from clearhead.anatomy.find import anatomy_of
from clearhead.anatomy.parts import Anatomy
from clearhead.errors import UserError, unknown
from clearhead.signal.attention_probe import AttentionProbe
from clearhead.signal.batch import Prepared, prepare
from clearhead.signal.hooks import Watcher
from clearhead.signal.keep import as_found
from clearhead.signal.objective import RANDOM, loss_of
from clearhead.signal.trace import Trace

TAPS = ("embedding", "input", "normed", "branch", "sum", "output", "logits", "attention", "effective_rank")
"""What `measure(taps=...)` can ask for: places, and the two costlier statistics."""


def measure(
    model: nn.Module,
    batch: Any,
    *,
    loss: Callable[[Any, Any], Tensor] | None = None,
    rows: int = 64,
    backward: bool = True,
    taps: Collection[str] = TAPS,
    valid: Tensor | None = None,
    seed: int = 0,
) -> Trace:
    """Run one forward (and backward) pass of `model` on `batch` and return what was found at every tap.

    The model runs in the mode it is in (call `.train()` first to see dropout) and is left as it was, bit for bit, also
    when something fails inside: parameters, `.grad`, buffers, flags, hooks, random generators. A model inside DDP or
    torch.compile is measured itself, without the wrapper and eagerly; a model sharded by `fully_shard` is called on
    every rank alike. Under several processes each measures its own batch: the trace is of the calling rank.

    What is taken, in float32 (float64 for a float64 model) whatever the model's dtype, autocast included:

    - forward, over valid tokens and features: mean, variance about that one mean, and covariance of the same feature
      over all pairs of different valid tokens of a sequence (see `Moments`); backward the same about 0 of the gradient
      of the loss by the activation;
    - on `branch` taps the Frobenius norm of the loss's gradient by each matrix, fused ones apart;
    - on attention's `branch` taps `AttentionStats`, on at most `rows` query rows a head: one sequence for each head in
      turn, the same positions in every layer, also where the model runs PyTorch's fused kernel;
    - on `input` and `output` taps the effective rank of at most `rows` tokens of each of two sequences.

    Args:
        batch: token ids [b, t]; a dict as the model takes it (input_ids, attention_mask, labels, ...; for our models
            tokens, valid, segments, targets, source, source_valid); pixels; or a tuple of the forward's arguments.
        loss: function (output, batch) -> scalar. Without it: the output's own loss, our targets, next tokens, or a
            random gradient of the output; `facts["loss_kind"]` says which (see `clearhead.signal.objective`).
        rows: size of the sample for attention and for effective ranks.
        backward: False measures the forward pass only.
        taps: a selection of `TAPS`.
        valid: bool [b, t], True = a real token, for models whose batch does not say it.
        seed: of dropout, of the sample and of the random output gradient. The same call gives the same trace.

    Raises `UserError` for a model without attention or with weights that are not finite, and for an empty batch,
    sequences of one token, ids beyond the vocabulary and labels that do not fit.
    """
    began = time.perf_counter()
    for name in taps:
        if name not in TAPS:
            raise unknown("tap", name, TAPS)
    if rows < 1:
        raise UserError(f"measure: rows: expected a whole number of at least 1, got {rows}")
    anatomy = anatomy_of(model)
    check_weights(anatomy.model)
    prepared = prepare(anatomy, batch, valid)
    probe = AttentionProbe(rows, seed)
    watcher = Watcher(anatomy, prepared, probe, rows=rows, backward=backward, taps=frozenset(taps), seed=seed)

    value, kind = None, None
    looking = probe.looking() if "attention" in taps else nullcontext()
    with (
        torch.inference_mode(False),
        as_found(anatomy.model, seed),
        watcher.hooks(),
        torch.set_grad_enabled(backward),
    ):
        with looking:
            output = _called(anatomy.model, prepared)
        watcher.check()
        if backward:
            generator = torch.Generator().manual_seed(seed)
            scalar, kind = loss_of(anatomy, output, prepared, batch, loss, generator)
            del output
            gradients = _gradients(anatomy, scalar, prepared.streams)
            watcher.take_parameters(gradients)
            value = float(scalar.detach())
    found, notes = watcher.taps(), list(watcher.notes())
    if kind == RANDOM:
        notes.append("backward: no loss at hand; the gradient of the output is iid standard normal")
    world = _world()
    if world is not None:
        notes.append(f"measured on rank {world[0]} of {world[1]}, on its own batch")
    dtype = next((p.dtype for p in anatomy.model.parameters() if p.is_floating_point()), torch.float32)
    facts = {
        **watcher.facts(),
        "family": anatomy.family,
        "training": anatomy.model.training,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "seed": seed,
        "loss": value if kind != RANDOM else None,
        "loss_kind": kind,
        "seconds": time.perf_counter() - began,
    }
    return Trace("measured", found, tuple(notes), facts)


def check_weights(model: nn.Module) -> None:
    """Raise `UserError` naming the first parameter that holds a number that is not finite."""
    names, verdicts = [], []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise UserError(f"measure: {name} is on the meta device, it has no values; load or initialise the model")
        if parameter.is_floating_point() and parameter.numel():
            names.append(name)
            # A sum is finite only if its terms are; the terms are looked at one by one only where it is not.
            verdicts.append(_whole(parameter.detach().sum(dtype=torch.float32)))
    if not verdicts:
        return
    for name, total in zip(names, torch.stack([v.cpu() for v in verdicts]).tolist(), strict=True):
        if total == total and abs(total) != float("inf"):
            continue
        wrong = int(_whole((~torch.isfinite(model.get_parameter(name).detach())).sum()))
        if wrong:
            raise UserError(f"measure: {name} holds {wrong} numbers that are not finite (NaN or infinite)")


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value, for which every rank asks alike; any other as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def _called(model: nn.Module, prepared: Prepared) -> Any:
    try:
        return model(*prepared.args, **prepared.kwargs)
    except (ValueError, RuntimeError, IndexError) as error:
        if prepared.kwargs.get("labels") is None or isinstance(error, UserError):
            raise
        shape = tuple(prepared.kwargs["labels"].shape)
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"measure: the model fails on this batch, with labels of shape {shape}: {first}") from error


def _gradients(anatomy: Anatomy, loss: Tensor, streams: tuple[Tensor, ...]) -> dict[int, Tensor]:
    """Gradient by each matrix's parameter, by the parameter's id.

    `torch.autograd.grad` writes no `.grad` and wakes no hook of DDP or of a user's optimizer. Parameters that
    `fully_shard` keeps in pieces get theirs only through `.backward()`; `as_found` has put their `.grad` aside.
    """
    parameters = [p for p in anatomy.model.parameters() if p.requires_grad]
    if not loss.requires_grad:
        raise UserError("measure: the loss does not depend on the model's parameters; there is no gradient to measure")
    if any(hasattr(p, "full_tensor") for p in parameters):
        loss.backward()
        return {id(p): _whole(p.grad) for p in parameters if p.grad is not None}
    found = torch.autograd.grad(loss, [*parameters, *streams], allow_unused=True)
    return {id(p): g for p, g in zip(parameters, found, strict=False) if g is not None}


def _world() -> tuple[int, int] | None:
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.get_rank(), dist.get_world_size()
