"""The processes that train one model together: none but this one, or those that torchrun started.

Why torch's own engine and not accelerate: accelerate's launcher can answer with less than was asked and not say so.
Run on a CPU (accelerate 1.15), `accelerate launch --cpu --num_processes 2` trains ONE process; `torchrun` around
`Accelerator()` without `cpu=True` trains two models that never meet; FSDP2 becomes DDP. Each run looks healthy. So here
the launcher is never trusted: `World.join` lets every process add a 1 and compares the sum with what was asked for,
and under fsdp every parameter must have become a DTensor.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor

from clearhead.errors import UserError
from clearhead.layers.block import Block
from clearhead.train.config import TrainConfig

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out", "NCCL")
"""What gloo and NCCL say of a peer that died or does not answer."""


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and its device. Rank 0 alone writes."""

    rank: int
    size: int
    device: torch.device
    parallel: str

    @classmethod
    @contextlib.contextmanager
    def join(cls, train: TrainConfig) -> Iterator[World]:
        """Meet the other processes for the time of a `with` block.

        Raises `UserError` when the launcher and `train.parallel` disagree, and for a device that is not there.
        """
        asked = int(os.environ.get("WORLD_SIZE", "1"))
        if train.parallel == "none":
            if asked > 1:
                raise UserError(
                    f"train.parallel=none under a launcher of {asked} processes would train {asked} models apart; "
                    f"set train.parallel=ddp or fsdp, or start it without torchrun"
                )
            yield cls(0, 1, choose_device(train.device, 0), "none")
            return
        if asked < 2:
            raise UserError(
                f"train.parallel={train.parallel} needs several processes and this is the only one; start it by "
                f"`torchrun --standalone --nproc_per_node 2 ...`, or set train.parallel=none"
            )
        if train.batch_size % (asked * train.grad_accum):
            raise UserError(
                f"train.batch_size={train.batch_size}: expected a multiple of {asked} processes x "
                f"grad_accum={train.grad_accum}, since batch_size counts the windows of a whole step"
            )
        device = choose_device(train.device, int(os.environ.get("LOCAL_RANK", "0")))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        began = not dist.is_initialized()
        if began:
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        try:
            ones = torch.ones((), device=device)
            dist.all_reduce(ones)
            if int(ones) != asked or dist.get_world_size() != asked:
                raise UserError(
                    f"expected {asked} processes in one group, {int(ones)} answered: they would train apart; start "
                    f"them together by torchrun, before anything else makes a process group"
                )
            yield cls(dist.get_rank(), asked, device, train.parallel)
        finally:
            if began:
                dist.destroy_process_group()

    @property
    def writes(self) -> bool:
        """Whether this process writes files and speaks to the person."""
        return self.rank == 0

    def wrap(self, model: nn.Module, *, compiled: bool) -> nn.Module:
        """Return what the loop calls: `model` itself, compiled, or spread over the processes.

        fsdp shards `model` in place, block by block (FSDP2). Its state is the same named tensors in every case.
        """
        if self.parallel == "fsdp":
            from torch.distributed.fsdp import fully_shard
            from torch.distributed.tensor import DTensor

            for block in [module for module in model.modules() if isinstance(module, Block)]:
                fully_shard(block)
            fully_shard(model)
            whole = [name for name, p in model.named_parameters() if not isinstance(p, DTensor)]
            if whole:
                raise RuntimeError(f"fsdp left {len(whole)} parameters whole, among them {whole[0]}")
        called: nn.Module = torch.compile(model) if compiled else model  # type: ignore[assignment]
        if self.parallel == "ddp":
            called = nn.parallel.DistributedDataParallel(called)
        return called

    @contextlib.contextmanager
    def micro_batch(self, called: nn.Module, *, last: bool) -> Iterator[None]:
        """Let gradients meet in the last micro-batch of a step only; before that each process adds up its own."""
        if self.parallel == "ddp" and not last:
            with called.no_sync():  # type: ignore[operator]
                yield
        else:
            if self.parallel == "fsdp":
                called.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def sum(self, values: Tensor) -> Tensor:
        """Add `values` over all processes (in place), so that each decides alike."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def lost(self, error: Exception) -> bool:
        """Whether `error` is how torch says that another process has died or does not answer."""
        if self.size == 1 or not isinstance(error, RuntimeError):  # DistBackendError is one
            return False
        return any(sign in str(error) for sign in LOST)

    def wait(self) -> None:
        """Wait for every process."""
        if self.size > 1:
            dist.barrier()

    def share(self, value: Any) -> Any:
        """Return rank 0's `value` on every process (plain values: it travels as JSON-like objects of torch)."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=self.device if self.device.type == "cuda" else None)
        return box[0]


def choose_device(name: str, local_rank: int) -> torch.device:
    """Return the device for `name`; `auto` takes a CUDA GPU when there is one. Raises `UserError` when it is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"train.device: expected auto, cpu, cuda, cuda:1 or mps, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError("train.device=cuda: torch sees no CUDA GPU here; set train.device=cpu or auto")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"train.device: there is no {device}; torch sees {torch.cuda.device_count()} GPU(s)")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("train.device=mps: not available here; set train.device=cpu or auto")
    return device


def whole(tensor: Tensor) -> Tensor:
    """Return a DTensor's full value (every process must ask), and any other tensor as it is."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a DTensor, and any other tensor as it is."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def like(value: Tensor, tensor: Tensor) -> Tensor:
    """Return the full `value`, which every process holds, placed and sharded as `tensor` is."""
    value = value.to(tensor.device, tensor.dtype)
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import distribute_tensor

    placements = tensor.placements  # type: ignore[attr-defined]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)  # each takes its part, nothing is sent
