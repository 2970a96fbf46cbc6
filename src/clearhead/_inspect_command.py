"""`clearhead inspect`: which model, which text, what to print and to write. Used by `cli.py` alone."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clearhead._run_commands import open_run
from clearhead.errors import UserError, unknown
from clearhead.models.config import PRESETS, ModelConfig
from clearhead.models.pretrained_config import PretrainedConfig

if TYPE_CHECKING:
    from clearhead._options import Inspect
    from clearhead.signal.findings import Report

DEFAULT_DATA = "shakespeare"

LARGE = 12 * 64**2
"""Layers times width^2 above which the comparison of before and after is a short one."""
SHORT_STEPS = 200
SHORT = (
    "optim.schedule=constant",
    "optim.lr=0.001",
    "optim.warmup_steps=50",
    "train.batch_size=8",
    "data.context=32",
    "model.context=32",
)
"""Few and short steps, enough to leave the plateau of token frequencies: 48 layers of width 64 take about 45 seconds of
one core a run. A rate that falls in 200 steps falls too early, and without the warm-up a deep Post-LN stack with
DeepScaleLM stays where it is at this rate."""


@dataclass
class Subject:
    """What is inspected: a config or a model, with the text that belongs to it."""

    name: str
    source: Any
    """A `ModelConfig` or an nn.Module."""
    tokenizer: Any = None
    """encode(text) -> ids; None = bytes for our configs."""
    mask_id: int | None = None
    """The token that stands for a hidden one, where the tokenizer has one."""
    data: str | None = None
    """The text that the model was trained on."""
    notes: tuple[str, ...] = ()


def inspect(asked: Inspect) -> int:
    """Inspect, print, and write the report's folder. Returns the exit code."""
    subject = find(asked.model, asked.set, asked.device)
    from rich.console import Console

    from clearhead._inspect_batch import make_batch
    from clearhead.signal.console import print_report
    from clearhead.signal.inspection import inspect as run
    from clearhead.signal.report import write_report

    data = asked.data or subject.data or DEFAULT_DATA
    fed = None if asked.theory else make_batch(subject, data, asked)
    if fed is not None and hasattr(subject.source, "train"):
        subject.source.train(not asked.eval)
    with Console(stderr=True).status("measuring" if fed is not None else "predicting"):
        report = run(
            subject.source,
            None if fed is None else fed.batch,
            tokens=asked.context,
            title=subject.name,
            seed=asked.seed,
            command=lambda config, overrides: compare_command(config, overrides, data),
        )
    if fed is not None:
        report = dataclasses.replace(report, facts={**report.facts, "data": fed.words})
    if subject.notes:
        predicted = dataclasses.replace(report.predicted, notes=(*subject.notes, *report.predicted.notes))
        report = dataclasses.replace(report, predicted=predicted)
    if asked.json:
        from clearhead.signal.stored import to_json

        print(to_json(report))
    else:
        print_report(report, Console())
    folder = asked.out or Path(f"inspect-{Path(subject.name).name}")
    path = write_report(report, folder)
    print(f"report: {path}", file=sys.stderr)
    if asked.apply is not None:
        apply(report, subject, asked.apply)
    return 0


# ---- which model ----


def find(name: str, changes: Sequence[str], device: str) -> Subject:
    """Return the model that `name` means: a named size, a folder (run, saved model, Hugging Face), a config, a GGUF."""
    path = Path(name).expanduser()
    if name in PRESETS:
        return Subject(name, changed(PRESETS[name], changes))
    if not path.exists():
        raise unknown("--model: not a folder, and not a named size:", name, PRESETS)
    if path.suffix in (".json", ".gguf") or not (path / "config.json").exists():
        if path.suffix == ".gguf":
            return _only_whole(_hugging_face(path.parent, device, gguf=path.name), changes)
        if path.suffix == ".json":
            return Subject(path.stem, changed(read_model_config(path), changes))
        raise UserError(f"{name}: expected a folder with a config.json (a run, a saved model, or a Hugging Face model)")
    values = _json(path / "config.json")
    if "model" in values and "data" in values:
        return _only_whole(_run(path, device), changes)
    if "model_type" in values:
        return _only_whole(_hugging_face(path, device), changes)
    from clearhead.models.io import load_model
    from clearhead.train.world import choose_device

    return _only_whole(Subject(path.name, load_model(path, device=choose_device(device, 0))), changes)


def changed(config: ModelConfig, changes: Sequence[str]) -> ModelConfig:
    """Apply `key=value` texts to a config, values read by the type of their field."""
    from clearhead.compare.arms import read_value
    from clearhead.errors import nearest

    if not changes:
        return config
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    overrides: dict[str, Any] = {}
    for text in changes:
        key, equals, value = text.partition("=")
        key = key.strip().removeprefix("model.").replace("-", "_")
        if not equals:
            raise UserError(f"--set: expected key=value, such as layers=96, got {text!r}")
        if key not in names:
            raise UserError(f"--set: unknown model option {key!r}{nearest(key, names)}")
        overrides[key] = value.strip()
    hints = typing.get_type_hints(ModelConfig)
    return dataclasses.replace(config, **{key: read_value(text, hints[key], key) for key, text in overrides.items()})


def read_model_config(path: Path) -> ModelConfig:
    """Read a model's config from a JSON file: the config alone, or a run's, of which it takes the model's part."""
    values = _json(path)
    return ModelConfig.from_dict(values["model"] if isinstance(values.get("model"), dict) else values)


def _only_whole(subject: Subject, changes: Sequence[str]) -> Subject:
    if changes:
        raise UserError("--set changes a named size or a config file; a model with weights is inspected as it is")
    return subject


def _run(folder: Path, device: str) -> Subject:
    config, tokenizer, model = open_run(folder, device)
    if isinstance(config.model, PretrainedConfig):
        raise UserError(
            f"{folder}: a fine-tuned model is inspected as a Hugging Face folder; repeat the command that trained it "
            f"with --export FOLDER, then: clearhead inspect --model FOLDER"
        )
    return Subject(folder.name, model, tokenizer.encode, data=config.data.source)


def _hugging_face(folder: Path, device: str, gguf: str | None = None) -> Subject:
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"{folder}: a Hugging Face model needs the transformers package: pip install 'clearhead[hf]'"
        ) from None
    from clearhead.anatomy.find import anatomy_of
    from clearhead.train.world import choose_device

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    more: dict[str, Any] = {"gguf_file": gguf} if gguf else {}
    notes: list[str] = []
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **more)
        kind, named = _class_of(config, gguf is not None)
        weights = gguf or any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        if weights:
            model, found = kind.from_pretrained(folder, local_files_only=True, output_loading_info=True, **more)
            missing = sorted(found["missing_keys"])
            if missing:
                notes.append(
                    f"the weights' file lacks {len(missing)} of the model's parameters, {missing[0]} first: these are "
                    f"drawn at random"
                )
        else:
            notes.append("the folder holds no weights: they are drawn at random, as transformers does")
            model = kind._from_config(config) if named else kind.from_config(config)
    except Exception as error:  # transformers raises of every kind for a broken folder
        raise UserError(f"{folder}: transformers cannot load it ({' '.join(str(error).split())[:300]})") from error
    anatomy_of(model)  # a model without attention is refused before any text is read
    encode, mask_id = _tokenizer(folder, more)
    if encode is None and model.main_input_name == "input_ids":
        notes.append("the folder holds no tokenizer: the tokens are drawn by Zipf's law")
    model = model.to(choose_device(device, 0))
    return Subject(gguf or folder.name, model, encode, mask_id, None, tuple(notes))


def _class_of(config: Any, gguf: bool) -> tuple[Any, bool]:
    """(the class that the config names, True), or (one that fits any, False)."""
    import transformers

    named = [name for name in (config.architectures or []) if hasattr(transformers, name)]
    if named:
        return getattr(transformers, named[0]), True
    causal = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if gguf and config.model_type in causal and not config.is_encoder_decoder:  # a .gguf names no class
        return transformers.AutoModelForCausalLM, False
    return transformers.AutoModel, False


def _tokenizer(folder: Path, more: Mapping[str, Any]) -> tuple[Any, int | None]:
    """(encode, id of the mask token); None without a tokenizer, or with one that was made without a vocabulary."""
    import transformers

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, **more)
        sample = loaded("So long lives this", add_special_tokens=False)["input_ids"]
    except Exception:  # of every kind, as above
        return None, None
    if len(set(sample)) < 2:
        return None, None
    return (lambda text: loaded(text, add_special_tokens=False)["input_ids"]), loaded.mask_token_id


# ---- what to do about it ----


def compare_command(config: ModelConfig, overrides: Mapping[str, Any], data: str) -> str:
    """Return the shell command that trains `config` before and after `overrides` and says whether it helped."""
    from clearhead.compare.plan import PRESETS as PLANS

    if config.architecture != "decoder":
        return ""
    base = PLANS["quick"].base.model
    skip = {"vocab_size", "context"}
    changes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if field.name not in skip and getattr(config, field.name) != getattr(base, field.name)
    }
    words = ["clearhead", "compare", "--preset", "quick"]
    if data != DEFAULT_DATA:
        words += ["--data", shlex.quote(data)]
    sizes = [f"model.{key}={shlex.quote(_plain(value))}" for key, value in changes.items()]
    if _large(config):
        words += ["--steps", str(SHORT_STEPS)]
        sizes = [*SHORT, *sizes]
    if sizes:
        words += ["--set", *sizes]
    after = " ".join(f"model.{key}={_plain(value)}" for key, value in overrides.items())
    words += ["--arm", '"before:"', f'"after: {after}"']
    return " ".join(words)


def apply(report: Report, subject: Subject, target: Path) -> None:
    """Write the config with the best advice applied, and say how to train it."""
    if not report.advice:
        raise UserError("--apply: there is no advice to apply; nothing was written")
    config = subject.source if isinstance(subject.source, ModelConfig) else getattr(subject.source, "config", None)
    best = report.advice[0]
    if not isinstance(config, ModelConfig):
        raise UserError(f"--apply writes configs of clearhead's own models; for this model use: {best.line}")
    repaired = dataclasses.replace(config, **best.overrides)
    if target.exists():
        raise UserError(f"--apply: {target} exists; choose another name, nothing was written")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(repaired.to_dict(), indent=1) + "\n", encoding="utf-8")
    rate = " --optim.lr 0.001 --optim.warmup-steps 100" if _large(repaired) else ""
    line = f"clearhead train --out runs/repaired --model {shlex.quote(str(target))}{rate}"
    print(f"applied: {best.title}; train it with: {line}", file=sys.stderr)


def _large(config: ModelConfig) -> bool:
    return config.layers * config.width**2 > LARGE


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return "none" if value is None else str(value)


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a JSON object")
    return values
