"""The zoo: tiny random architectures of transformers, to run a patch on before trusting it with a real one.

    model = zoo.build("llama")                  # in eval mode, from seed 0
    batch = zoo.inputs("llama", padding="left")

The configurations are in `zoo_entries.py`. Everything is made from configs; nothing is downloaded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from clearhead.errors import UserError, unknown
from clearhead.hf.zoo_entries import ENTRIES, VOCABULARY, Entry

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["ENTRIES", "LENGTH", "Entry", "Padding", "build", "find", "inputs", "transformers_or_error"]

LENGTH, TARGET_LENGTH, PADDED, SAMPLES = 40, 10, 5, 256
"""Tokens of an input and of a decoder's input, how many of the second sequence's are padding, samples of sound.

BigBird's own block-sparse attention runs from 14 + 1 tokens on with the zoo's blocks of 2."""
SPREAD = 0.15
"""Standard deviation of a matrix, where the architecture's own is smaller."""
Padding = Literal["none", "left", "right"]


def transformers_or_error() -> Any:
    """The module, or one line that says how to get it."""
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"this needs transformers, which is not here ({error}); pip install 'clearhead[hf]'") from None
    return transformers


def find(name: str | Entry) -> Entry:
    """The entry of that name; `UserError` with the nearest one."""
    if isinstance(name, Entry):
        return name
    if name not in ENTRIES:
        raise unknown("architecture", name, ENTRIES)
    return ENTRIES[name]


def build(name: str | Entry, **changes: Any) -> torch.nn.Module:
    """The model in eval mode, its parameters drawn from seed 0; `changes` are values of the config.

    Raises `UserError` when the installed transformers does not know the architecture.
    """
    import torch

    entry = find(name)
    transformers = transformers_or_error()
    transformers.logging.set_verbosity_error()
    for needed in (entry.model, entry.config):
        if not hasattr(transformers, needed):
            raise UserError(f"{entry.name}: transformers {transformers.__version__} has no {needed}")
    config = getattr(transformers, entry.config)(**{**entry.values, **changes})
    _without_dropout(config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: torch.nn.Module = getattr(transformers, entry.model)(config)
        _stir(model)
    return model.eval()


def _without_dropout(config: Any) -> None:
    """Set every rate to 0: LASER refuses dropped weights, and a gradient is to be the same twice."""
    for part in (config, getattr(config, "attn_config", None)):
        for name, value in list(vars(part).items()) if part is not None else ():
            if isinstance(value, float) and ("dropout" in name or "drop_path" in name or name.endswith("pdrop")):
                setattr(part, name, 0.0)


def _stir(model: torch.nn.Module) -> None:
    """Leave the start values: their scores are almost all 0, and a term at 1 or 0 that a patch drops does not show."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif parameter.std() < SPREAD:
                parameter.copy_(SPREAD * torch.randn_like(parameter))


def inputs(name: str | Entry, padding: Padding = "none", seed: int = 1) -> dict[str, Tensor]:
    """Two sequences, the second padded by `PADDED` tokens where that is asked (sound: on the right only, in samples).

    Raises `ValueError` for a padding that the architecture has no mask for.
    """
    import torch

    entry = find(name)
    draw = torch.Generator().manual_seed(seed)
    if padding != "none" and padding not in paddings(entry):
        raise ValueError(f"{entry.name}: no {padding} padding: it takes no attention_mask for one")
    if entry.kind == "vision":
        size = entry.values["image_size"]
        return {"pixel_values": torch.randn(2, 3, size, size, generator=draw)}
    if entry.kind == "speech":
        batch = {"input_values": torch.randn(2, SAMPLES, generator=draw)}
        if padding == "right":
            batch["attention_mask"] = torch.ones(2, SAMPLES, dtype=torch.long)
            batch["attention_mask"][1, -SAMPLES // 4 :] = 0
        return batch

    def tokens(length: int) -> Tensor:
        return torch.randint(3, VOCABULARY, (2, length), generator=draw)

    if entry.name == "whisper":
        frames = torch.randn(2, 8, 2 * entry.values["max_source_positions"], generator=draw)
        return {"input_features": frames, "decoder_input_ids": tokens(TARGET_LENGTH)}
    batch = {"input_ids": tokens(LENGTH)}
    if entry.kind == "seq2seq":
        batch["decoder_input_ids"] = tokens(TARGET_LENGTH)
    if padding != "none":
        mask = torch.ones(2, LENGTH, dtype=torch.long)
        mask[1, slice(0, PADDED) if padding == "left" else slice(LENGTH - PADDED, LENGTH)] = 0
        batch["attention_mask"] = mask
    return batch


def paddings(name: str | Entry) -> tuple[Padding, ...]:
    """On which sides the architecture can be padded, its mask saying where."""
    entry = find(name)
    if entry.kind == "vision" or entry.name == "whisper":
        return ()
    return ("right",) if entry.kind == "speech" else ("left", "right")
