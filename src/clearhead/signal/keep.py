"""Leaving a model exactly as it was found, whatever happens in between."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import torch.nn as nn


@contextmanager
def as_found(model: nn.Module, seed: int) -> Iterator[None]:
    """Inside the `with` block: random numbers drawn from `seed`, every parameter without a `.grad` and asking for one,
    compiled code run eagerly, gradient checkpointing off. Afterwards, also after an exception or Ctrl-C: the
    generators, `.grad`, `requires_grad`, buffers and flags of before, bit for bit, and the very same tensor objects.
    """
    with ExitStack() as stack:
        stack.enter_context(_generators(model, seed))
        stack.enter_context(_gradients(model))
        stack.enter_context(_buffers(model))
        stack.enter_context(_attributes(model))
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _generators(model: nn.Module, seed: int) -> Iterator[None]:
    places = {p.device for p in model.parameters()} | {torch.device("cpu")}
    kinds = {place.type for place in places} - {"cpu"}
    held = random.getstate(), np.random.get_state()
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in kinds:
            indices = [place.index or 0 for place in places if place.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=indices, device_type=kind))
        try:
            torch.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
        finally:
            random.setstate(held[0])
            np.random.set_state(held[1])


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    held = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    try:
        for p, _, _ in held:
            p.grad = None
            if p.is_floating_point() and not p.requires_grad:
                p.requires_grad_(True)
        yield
    finally:
        for p, gradient, wanted in held:
            p.requires_grad_(wanted)
            p.grad = gradient


@contextmanager
def _buffers(model: nn.Module) -> Iterator[None]:
    held = [
        (module, name, buffer, None if buffer is None else (buffer.detach().clone(), buffer._version))
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, copy in held:
                if copy is not None and buffer is not None and buffer._version != copy[1]:
                    buffer.copy_(copy[0])  # in place: somebody else may hold the same tensor
                module._buffers[name] = buffer


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing would run forward hooks again in the backward pass, so it is off meanwhile."""
    held = [module for module in model.modules() if getattr(module, "gradient_checkpointing", None) is True]
    try:
        for module in held:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in held:
            module.gradient_checkpointing = True  # type: ignore[assignment]
