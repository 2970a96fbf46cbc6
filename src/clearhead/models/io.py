"""A model on disk: a folder with model.safetensors and config.json. Nothing is unpickled."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clearhead._disk import disk_errors
from clearhead.errors import UserError
from clearhead.models.config import ModelConfig
from clearhead.models.make import ARCHITECTURES, AnyModel, begin_model
from clearhead.models.pretrained_config import ARCHITECTURE as PRETRAINED
from clearhead.models.pretrained_config import PretrainedConfig

if TYPE_CHECKING:
    from clearhead.hf.model import Pretrained

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


def save_model(model: AnyModel, folder: Path | str) -> None:
    """Write the model to `folder`, which is made if needed.

    Each file is written under a temporary name and renamed, so a reader or a crash finds the old file or the new one,
    never half. A tied output matrix is stored once. The weights carry the config too: `load_model` refuses a folder
    whose two files do not belong together.

    Raises `UserError` in one line for a full or read-only disk, `TypeError` for a wrapped model (compiled,
    distributed), whose names would not load.
    """
    if not isinstance(model, tuple(ARCHITECTURES.values())):
        raise TypeError(
            f"save_model: expected a model of clearhead (Decoder, Encoder, FeedbackDecoder, Seq2Seq), got "
            f"{type(model).__name__}; pass the model inside the wrapper"
        )
    folder = Path(folder)
    text = json.dumps(model.config.to_dict(), indent=2)
    tensors = {name: t.detach().cpu().contiguous() for name, t in _stored(model).items()}
    metadata = {"format": "pt", "config": json.dumps(model.config.to_dict(), sort_keys=True)}
    with disk_errors(f"{folder}", "what was there before is untouched"):
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / WEIGHTS, lambda path: save_file(tensors, path, metadata=metadata))
        _replace(folder / CONFIG, lambda path: path.write_text(text + "\n", encoding="utf-8"))


def load_model(folder: Path | str, *, device: torch.device | str | None = None) -> AnyModel | Pretrained:
    """Read a model that `save_model` wrote, in eval mode and in the stored dtype; its class is the config's.

    Of a fine-tuned pretrained model the folder holds what was learned; the rest is read from where it was.

    Raises `UserError`, in one line, for a missing, broken or mismatched file.
    """
    folder = Path(folder)
    config = read_stored_config(folder)
    tensors, stored_config = _read_weights(folder / WEIGHTS)
    if stored_config is not None and not _same(stored_config, config):
        raise UserError(f"{folder}: {WEIGHTS} was saved with another config than {CONFIG} states; restore the pair")

    pretrained = isinstance(config, PretrainedConfig)
    model: Any = begin_model(config) if isinstance(config, PretrainedConfig) else _empty(config)
    expected = _stored(model)
    for problem, names in (("lacks", expected.keys() - tensors), ("has unknown", tensors.keys() - expected)):
        if names:
            raise UserError(f"{folder / WEIGHTS} {problem} {_few(names)}; it does not belong to {CONFIG} beside it")
    for name, wanted in expected.items():
        if tensors[name].shape != wanted.shape:
            raise UserError(
                f"{folder / WEIGHTS}: {name} has shape {tuple(tensors[name].shape)}, "
                f"{CONFIG} asks for {tuple(wanted.shape)}"
            )
    if pretrained:
        model.load_state_dict(tensors, strict=False)  # the checks above have seen to what learns
        return model.to(device).eval()
    dtypes = {tensors[name].dtype for name, _ in model.named_parameters()}  # constants keep a dtype of their own
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    model.load_state_dict(tensors, strict=False)  # strict but for the tied matrix, which the checks above have seen to
    return model.to(device).eval() if device is not None else model.eval()


def _empty(config: ModelConfig) -> AnyModel:
    return ARCHITECTURES[config.architecture](config)


def read_config(folder: Path | str) -> ModelConfig:
    """Read the config of a model of our own; `UserError` when it is missing or broken, or a pretrained model's."""
    config = read_stored_config(folder)
    if isinstance(config, PretrainedConfig):
        raise UserError(f"{folder} holds what was learned beside the pretrained model {config.source}, no whole model")
    return config


def read_stored_config(folder: Path | str) -> ModelConfig | PretrainedConfig:
    """Read a model folder's config of either kind; `UserError` when it is missing or broken."""
    path = Path(folder) / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no model in {folder}: {CONFIG} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {_one_line(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object of model options, got {type(values).__name__}")
    try:
        return _config_of(values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _config_of(values: dict[str, Any]) -> ModelConfig | PretrainedConfig:
    kind: Any = PretrainedConfig if values.get("architecture") == PRETRAINED else ModelConfig
    config: ModelConfig | PretrainedConfig = kind.from_dict(values)
    return config


def _read_weights(path: Path) -> tuple[dict[str, torch.Tensor], Any]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            config = (file.metadata() or {}).get("config")
        return tensors, None if config is None else json.loads(config)
    except FileNotFoundError:
        raise UserError(f"no model in {path.parent}: {path.name} is missing") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is broken: {_one_line(error)}") from None


def _same(stored: Any, config: ModelConfig | PretrainedConfig) -> bool:
    """Whether the weights' config is `config`; an older version's lacks the options that came later."""
    try:
        return _config_of(stored) == config
    except (UserError, TypeError):
        return False


def _stored(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict with each tied matrix under its first name only."""
    seen: set[int] = set()
    stored = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            stored[name] = tensor.detach()
    return stored


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.part")  # one fixed name, so that what a crash left is overwritten
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _few(names: set[str]) -> str:
    some = sorted(names)
    return ", ".join(some[:3]) + (f" and {len(some) - 3} more" if len(some) > 3 else "")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
