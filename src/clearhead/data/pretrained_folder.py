"""Where a pretrained model lies, and what its config.json says. Imports neither torch nor transformers."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from clearhead.data.cache import file_sha256
from clearhead.errors import UserError

CONFIG = "config.json"
CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel")
"""How transformers' classes that continue text are called."""
POSITION_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


def pretrained_folder(source: str) -> Path:
    """Return the folder of a model: a folder of one's own, or a name that `clearhead data fetch` knows.

    Raises `UserError` for an unknown name, and for one that was not fetched yet.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_absolute() or "/" in source or os.sep in source:
        raise UserError(f"--model {source}: there is no such folder")
    from clearhead.data.models import model_folder

    return model_folder(source)


def read_causal_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json. Raises `UserError` when it is missing, or the model does not continue text."""
    path = folder / CONFIG
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no Hugging Face model: {CONFIG} is missing") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{folder} holds no Hugging Face model: {CONFIG} names no model_type")
    classes = values.get("architectures") or []
    if values.get("is_encoder_decoder") or not any(str(name).endswith(CAUSAL_ENDINGS) for name in classes):
        raise UserError(
            f"{folder} holds no causal language model: its class is {', '.join(classes) or 'not named'}, expected one "
            f"that ends in {' or '.join(CAUSAL_ENDINGS)}"
        )
    if not any(next(folder.glob(pattern), None) for pattern in WEIGHT_FILES):
        raise UserError(f"{folder} holds no weights (*.safetensors); fine-tuning needs a pretrained model")
    return values


def text_value(config: dict[str, Any], *names: str) -> Any:
    """Return the first of `names` that the config has, or its text part (of a model that also sees or hears)."""
    for values in (config, config.get("text_config") or {}):
        for name in names:
            if values.get(name) is not None:
                return values[name]
    return None


def read_positions(source: str) -> int | None:
    """Return how many positions a model has; None when its config states no limit. Raises as `read_causal_config`."""
    found = text_value(read_causal_config(pretrained_folder(source)), *POSITION_KEYS)
    return None if found is None else int(found)


def weights_fingerprint(folder: Path) -> str:
    """Return a hash of the folder's weights and config: what two runs must share to have begun from the same model."""
    digest = hashlib.sha256()
    files = [path for pattern in WEIGHT_FILES for path in folder.glob(pattern)]
    for path in [folder / CONFIG, *sorted(files)]:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()[:32]
