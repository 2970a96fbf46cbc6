"""A package's members to a Hugging Face folder: copied, out of GGUF, out of a `.bin`, or out of CTranslate2.

No code of a package runs. A `.bin` is read with `weights_only=True`, which builds tensors and nothing else.
"""

from __future__ import annotations

import json
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from clearhead.data.cache import Progress, tell, write_json
from clearhead.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from clearhead.data.models import PretrainedModel


def convert(model: PretrainedModel, archive: Path, folder: Path, progress: Progress | None) -> dict[str, str]:
    """Fill `folder` with the model's files; return the versions of the libraries that the result depends on.

    Raises:
        UserError: when the archive lacks a member, or a member is not what the table says.
    """
    if model.convert == "copy":
        tell(progress, f"{model.name}: taking the files out of {model.archive}")
        _take(model, archive, folder)
        return {}
    with tempfile.TemporaryDirectory(prefix="clearhead-", dir=folder.parent) as scratch:
        tell(progress, f"{model.name}: taking the files out of {model.archive}")
        members = _take(model, archive, Path(scratch))
        tell(progress, f"{model.name}: converting to a Hugging Face folder, once (under a minute)")
        if model.convert == "gguf":
            return _from_gguf(members[0], folder)
        if model.convert == "bert":
            config, weights, vocabulary = members
            return _from_bert(config, weights, vocabulary, folder)
        from clearhead.data.whisper_convert import write_whisper

        config, weights, tokenizer = members
        write_whisper(config, weights, tokenizer, folder)
        return {}


def _take(model: PretrainedModel, archive: Path, folder: Path) -> list[Path]:
    """Write the named members, without their folders, and return them in the table's order."""
    with zipfile.ZipFile(archive) as packed:
        known = set(packed.namelist())
        taken = []
        for name in model.take:
            if name not in known:
                raise UserError(f"{model.archive} holds no {name!r}; the table of models is wrong")
            target = folder / PurePosixPath(name).name
            with packed.open(name) as stream, target.open("wb") as file:
                shutil.copyfileobj(stream, file)
            taken.append(target)
    return taken


def _from_gguf(weights: Path, folder: Path) -> dict[str, str]:
    """Spread a quantised model out to bf16 safetensors, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _quietly():
        tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
        model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.bfloat16)
        # What transformers remembers of the quantised file keeps it from saving the model that it has become.
        setattr(model, "hf_quantizer", None)  # noqa: B010  (not declared on the class)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.config._name_or_path = ""
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return {name: version(name) for name in ("transformers", "gguf")}


def _from_bert(config: Path, weights: Path, vocabulary: Path, folder: Path) -> dict[str, str]:
    """A BERT checkpoint of an own class to `BertForMaskedLM`: the encoder and the masked-token head."""
    import torch

    try:
        state: dict[str, Tensor] = torch.load(weights, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{weights.name} holds more than tensors and is not read: {str(error).splitlines()[0]}"
        ) from error
    kept = {name: value for name, value in state.items() if _belongs_to_masked_lm(name)}
    tied = ("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")
    if not torch.equal(state[tied[0]], state[tied[1]]):
        raise UserError(f"{weights.name}: the head's weights are not the embedding's, as BertForMaskedLM takes them")
    bias = state["cls.predictions.bias"]
    if not torch.equal(bias, state.get("cls.predictions.decoder.bias", bias)):
        raise UserError(f"{weights.name}: the head has two biases that differ; BertForMaskedLM has one")
    _save(kept, folder)
    settings = json.loads(config.read_text(encoding="utf-8"))
    for old in ("_name_or_path", "transformers_version", "gradient_checkpointing", "position_embedding_type"):
        settings.pop(old, None)
    write_json(folder / "config.json", settings | {"architectures": ["BertForMaskedLM"], "dtype": "float32"})
    shutil.copyfile(vocabulary, folder / "vocab.txt")
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "model_max_length": 512},
    )
    return {}


def _belongs_to_masked_lm(name: str) -> bool:
    """Not the pooler, the other heads, the position buffer, nor the head's tied copies."""
    left = ("bert.embeddings.position_ids", "cls.predictions.decoder.weight", "cls.predictions.decoder.bias")
    if name in left or name.startswith("bert.pooler."):
        return False
    return name.startswith(("bert.", "cls.predictions."))


def _save(state: dict[str, Tensor], folder: Path) -> None:
    from safetensors.torch import save_file

    whole = {name: value.contiguous() for name, value in state.items()}
    save_file(whole, folder / "model.safetensors", {"format": "pt"})


@contextmanager
def _quietly() -> Iterator[None]:
    """Without transformers' bars and notes: the caller tells what is being done."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
