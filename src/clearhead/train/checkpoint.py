"""Checkpoints on disk: complete or absent, checked by hash, and nothing is unpickled.

    checkpoint/step-00000200/   model.safetensors  config.json       readable by clearhead.models.io.load_model
                                optimizer.safetensors                AdamW's tensors as "parameter name/key"
                                companion.safetensors                what trains beside the model, if anything, and
                                companion_optimizer.safetensors      its part of the optimizer
                                history.safetensors                  a number per step: loss, gradient norm, seconds
                                memory.safetensors                   what goes from step to step, if anything
                                state.json                           the rest, and size and SHA-256 of every file

A checkpoint is written under another name, flushed to the disk and renamed, so a crash at any moment leaves the old
ones as they were. The one before the newest is kept: a damaged checkpoint costs the steps since then, not the run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from clearhead._disk import disk_errors, flush_folder, write_durably
from clearhead.errors import UserError
from clearhead.train.world import like, whole

FORMAT = 1
FOLDER, STATE = "checkpoint", "state.json"
MODEL, MODEL_CONFIG = "model.safetensors", "config.json"
OPTIMIZER, HISTORY, MEMORY = "optimizer.safetensors", "history.safetensors", "memory.safetensors"
COMPANION, COMPANION_OPTIMIZER = "companion.safetensors", "companion_optimizer.safetensors"


class Broken(Exception):
    """A checkpoint that cannot be used, with the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """What `read` found: tensors by file name, and the plain values."""

    folder: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]


def checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoints, newest first, unread."""
    found = (run / FOLDER).glob("step-*")
    return sorted((path for path in found if path.name[5:].isdigit()), key=lambda p: int(p.name[5:]), reverse=True)


def newest_model(run: Path | str) -> Path:
    """Return the folder of a run's newest whole checkpoint, for `clearhead.models.io.load_model`.

    Raises `UserError` when the run has no checkpoint or none is whole.
    """
    problems = []
    for folder in checkpoints(Path(run)):
        try:
            return read(folder).folder
        except Broken as problem:
            problems.append(f"{folder.name}: {problem}")
    raise UserError(f"{run}: no model there; " + ("; ".join(problems) or "the run has no checkpoint yet"))


def write(run: Path, step: int, files: Mapping[str, bytes], state: Mapping[str, Any], *, keep: int = 2) -> Path:
    """Write a checkpoint and remove all but the `keep` newest. Files are bytes: what is hashed is what was meant.

    Raises `UserError`, the older checkpoints untouched, when the disk is full or cannot be written.
    """
    about = {name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()}
    body = {"format": FORMAT, "step": step, **state, "files": about}
    root = run / FOLDER
    final, part = root / f"step-{step:08d}", root / f".step-{step:08d}.part"
    with disk_errors(f"checkpoint at step {step}", "the earlier checkpoints are untouched"):
        try:
            discard_parts(run)
            part.mkdir(parents=True)
            for name, data in files.items():
                write_durably(part / name, data)
            write_durably(part / STATE, json.dumps({**body, "sha256": _seal(body)}, allow_nan=False).encode())
            flush_folder(part)
            if final.exists():  # only one that could not be read
                os.replace(final, root / f"{final.name}.broken-{os.getpid()}")
            os.replace(part, final)
            flush_folder(root)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    keep_newest(run, keep)
    return final


def keep_newest(run: Path, count: int) -> None:
    """Remove all but the `count` newest checkpoints."""
    for old in checkpoints(run)[count:]:
        shutil.rmtree(old, ignore_errors=True)


def read(folder: Path) -> Checkpoint:
    """Read and check one checkpoint. Raises `Broken` with the reason."""
    try:
        state = json.loads((folder / STATE).read_bytes())
        if not isinstance(state, dict):
            raise Broken(f"{STATE} is not a JSON object")
        if state.get("format") != FORMAT:
            raise Broken(f"{STATE} has format {state.get('format')!r}, this version reads {FORMAT}")
        if state.pop("sha256", None) != _seal(state):
            raise Broken(f"{STATE} does not match its own hash")
        tensors = {}
        for name, about in state["files"].items():
            data = (folder / name).read_bytes()
            if len(data) != about["bytes"]:
                raise Broken(f"{name} has {len(data)} bytes of {about['bytes']}")
            if hashlib.sha256(data).hexdigest() != about["sha256"]:
                raise Broken(f"{name} does not match its hash")
            if name.endswith(".safetensors"):
                tensors[name] = load(data)
        missing = {MODEL, OPTIMIZER, HISTORY} - tensors.keys()
        if missing:
            raise Broken(f"{STATE} does not list {min(missing)}")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise Broken(" ".join(str(error).split()) or type(error).__name__) from None
    return Checkpoint(folder, int(state["step"]), tensors, state)


def read_newest(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Return the newest whole checkpoint (None when there is none at all) and a line about each damaged one passed by.

    Raises `UserError` when there are checkpoints and none is whole.
    """
    problems: list[str] = []
    for folder in checkpoints(run):
        try:
            return read(folder), problems
        except Broken as problem:
            problems.append(f"{folder.name} is damaged: {problem}")
    if problems:
        raise UserError(
            f"{run}: no checkpoint can be read ({'; '.join(problems)}); "
            f"remove {run / FOLDER} to train again from the start"
        )
    return None, []


def model_files(model: nn.Module) -> dict[str, bytes]:
    """Return the model as the files that `clearhead.models.io` reads. Under fsdp every process must call it."""
    config = model.config.to_dict()  # type: ignore[union-attr, operator]
    # One entry only: safetensors writes several in random order, and equal weights should be equal files.
    metadata = {"config": json.dumps(config, sort_keys=True)}
    tensors = {name: _plain(tensor) for name, tensor in _distinct(model)}
    return {MODEL: save(tensors, metadata), MODEL_CONFIG: json.dumps(config, indent=2).encode() + b"\n"}


def optimizer_file(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Return AdamW's state as tensors named "parameter name/key". Under fsdp every process must call it."""
    state = {name: optimizer.state.get(parameter, {}) for name, parameter in model.named_parameters()}
    tensors = {f"{name}/{key}": _plain(value) for name, of_one in state.items() for key, value in of_one.items()}
    return {OPTIMIZER: save(tensors)}


def memory_file(held: Mapping[str, Tensor]) -> dict[str, bytes]:
    """Return what a task carries from step to step as a file; none for a task that carries nothing."""
    return {MEMORY: save({name: tensor.cpu().contiguous() for name, tensor in held.items()})} if held else {}


def companion_files(module: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, bytes]:
    """Return what trains beside the model, and its part of the optimizer's state; no file for an empty one."""
    tensors = {name: _plain(tensor) for name, tensor in _distinct(module)}
    if not tensors:
        return {}
    return {COMPANION: save(tensors), COMPANION_OPTIMIZER: optimizer_file(module, optimizer)[OPTIMIZER]}


def restore_model(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into `model`, whole or sharded. Raises `Broken` when names or shapes do not fit."""
    own = dict(_distinct(model))
    if own.keys() != tensors.keys():
        raise Broken(f"{MODEL} holds other tensors than the model: {sorted(own.keys() ^ tensors.keys())[:3]}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != tensors[name].shape:
                raise Broken(f"{name} has shape {tuple(tensors[name].shape)}, the model's has {tuple(tensor.shape)}")
            tensor.copy_(like(tensors[name], tensor))


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put stored AdamW tensors back beside their parameters, placed and sharded as those are."""
    parameters = dict(model.named_parameters())
    for full_name, tensor in sorted(tensors.items()):  # safetensors has no order, and processes must go alike
        name, _, key = full_name.rpartition("/")
        if name not in parameters:
            raise Broken(f"{OPTIMIZER} holds {name!r}, which the model lacks")
        parameter = parameters[name]
        # The step count is a lone number on the parameter's device; the moments look like the parameter.
        value = tensor.to(parameter.device) if tensor.dim() == 0 else like(tensor, parameter)
        optimizer.state[parameter][key] = value.clone()


def restore_companion(
    module: nn.Module, optimizer: torch.optim.Optimizer, files: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Put back what `companion_files` gave, out of a checkpoint's files. Raises `Broken` when it does not fit."""
    restore_model(module, files.get(COMPANION, {}))
    restore_optimizer(module, optimizer, files.get(COMPANION_OPTIMIZER, {}))


def discard_parts(run: Path) -> None:
    """Remove what a crash in the middle of `write` left; only the run's owner may call it."""
    for part in (run / FOLDER).glob(".step-*.part"):
        shutil.rmtree(part, ignore_errors=True)


def _distinct(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The state dict with each tied tensor once, under its first name."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _plain(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().contiguous()


def _seal(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, allow_nan=False).encode()).hexdigest()
