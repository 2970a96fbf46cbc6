"""Whisper out of CTranslate2's arrays into a Hugging Face folder.

Each array is placed once, and the count is checked at the end: an array that has no place, or a place that stays
empty, raises. Differences between the two layouts:

* CTranslate2 keeps query, key and value of self-attention in one matrix, key and value of cross attention in
  another; here they are cut apart. Whisper's keys have no bias: the slice must be zero, and is dropped.
* The output projection is the token embedding there (an alias) and here (tied), so it is not written.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from clearhead.data.cache import write_json
from clearhead.data.ctranslate2 import CTranslate2File, read_ctranslate2
from clearhead.errors import UserError

_END = 50256
_START = 50257
_NO_TIMESTAMPS = 50362
_SETTINGS = (
    "activation",
    "alibi",
    "alignment_heads",
    "alignment_layer",
    "num_heads",
    "pre_norm",
    "scale_embeddings",
    "start_from_zero_embedding",
)
"""Numbers beside the weights; only the heads are read."""


def write_whisper(config: Path, weights: Path, tokenizer: Path, folder: Path) -> None:
    """Write weights (fp16), config, generation config, tokenizer and feature extractor of an English-only Whisper.

    Raises:
        UserError: when the file is no Whisper, or an array is left over.
    """
    from safetensors.numpy import save_file

    found = read_ctranslate2(weights)
    if found.specification != "WhisperSpec":
        raise UserError(f"{weights} is a {found.specification}; expected a WhisperSpec")
    if found.aliases != {"decoder/projection/weight": "decoder/embeddings/weight"}:
        raise UserError(f"{weights}: the output projection is not the embedding, as Whisper's is: {found.aliases}")
    state = dict(_placed(found, str(weights)))
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_json(folder / "config.json", _config(found, state))
    settings = json.loads(config.read_text(encoding="utf-8"))
    write_json(folder / "generation_config.json", _generation(settings))
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "WhisperTokenizer",
            "bos_token": "<|endoftext|>",
            "eos_token": "<|endoftext|>",
            "unk_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "model_max_length": 448,
        },
    )
    write_json(folder / "preprocessor_config.json", _feature_extractor(state))


def _placed(found: CTranslate2File, source: str) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face name and array; raises when an array of the file is left over or absent."""
    rest = dict(found.arrays)

    def take(name: str) -> np.ndarray:
        if name not in rest:
            raise UserError(f"{source} has no array {name!r}")
        return rest.pop(name)

    for setting in _SETTINGS:
        rest.pop(f"decoder/{setting}", None)
        rest.pop(f"encoder/{setting}", None)
    for conv in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            yield f"model.encoder.{conv}.{part}", take(f"encoder/{conv}/{part}")
    yield "model.decoder.embed_tokens.weight", take("decoder/embeddings/weight")
    for side in ("encoder", "decoder"):
        yield f"model.{side}.embed_positions.weight", take(f"{side}/position_encodings/encodings")
        yield from _norm(take, f"{side}/layer_norm", f"model.{side}.layer_norm")
        for layer in range(_layers(found, side)):
            old, new = f"{side}/layer_{layer}", f"model.{side}.layers.{layer}"
            yield from _norm(take, f"{old}/self_attention/layer_norm", f"{new}.self_attn_layer_norm")
            yield from _fused(take, f"{old}/self_attention/linear_0", f"{new}.self_attn", ("q", "k", "v"))
            yield from _linear(take, f"{old}/self_attention/linear_1", f"{new}.self_attn.out_proj")
            if side == "decoder":
                yield from _norm(take, f"{old}/attention/layer_norm", f"{new}.encoder_attn_layer_norm")
                yield from _linear(take, f"{old}/attention/linear_0", f"{new}.encoder_attn.q_proj")
                yield from _fused(take, f"{old}/attention/linear_1", f"{new}.encoder_attn", ("k", "v"))
                yield from _linear(take, f"{old}/attention/linear_2", f"{new}.encoder_attn.out_proj")
            yield from _norm(take, f"{old}/ffn/layer_norm", f"{new}.final_layer_norm")
            yield from _linear(take, f"{old}/ffn/linear_0", f"{new}.fc1")
            yield from _linear(take, f"{old}/ffn/linear_1", f"{new}.fc2")
    if rest:
        raise UserError(f"{source} holds {len(rest)} arrays that have no place here: {', '.join(sorted(rest)[:5])}")


def _layers(found: CTranslate2File, side: str) -> int:
    return len({name.split("/")[1] for name in found.arrays if name.startswith(f"{side}/layer_") and "/ffn/" in name})


def _norm(take: Any, old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{new}.weight", take(f"{old}/gamma")
    yield f"{new}.bias", take(f"{old}/beta")


def _linear(take: Any, old: str, new: str) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{new}.weight", take(f"{old}/weight")
    yield f"{new}.bias", take(f"{old}/bias")


def _fused(take: Any, old: str, new: str, parts: tuple[str, ...]) -> Iterator[tuple[str, np.ndarray]]:
    """One matrix into its rows for queries, keys and values."""
    weights = np.split(take(f"{old}/weight"), len(parts))
    biases = np.split(take(f"{old}/bias"), len(parts))
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        yield f"{new}.{part}_proj.weight", np.ascontiguousarray(weight)
        if part != "k":
            yield f"{new}.{part}_proj.bias", np.ascontiguousarray(bias)
        elif bias.any():
            raise UserError(f"{old}/bias: the keys have a bias, which Whisper's have not")


def _config(found: CTranslate2File, state: dict[str, np.ndarray]) -> dict[str, Any]:
    """Read the sizes off the arrays."""
    vocabulary, width = state["model.decoder.embed_tokens.weight"].shape
    sides = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_layers"] = _layers(found, side)
        sides[f"{side}_attention_heads"] = int(found.arrays[f"{side}/num_heads"])
        sides[f"{side}_ffn_dim"] = state[f"model.{side}.layers.0.fc1.weight"].shape[0]
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "is_encoder_decoder": True,
        "vocab_size": vocabulary,
        "d_model": width,
        **sides,
        "num_hidden_layers": sides["encoder_layers"],
        "num_mel_bins": state["model.encoder.conv1.weight"].shape[1],
        "max_source_positions": state["model.encoder.embed_positions.weight"].shape[0],
        "max_target_positions": state["model.decoder.embed_positions.weight"].shape[0],
        "activation_function": "gelu",
        "bos_token_id": _END,
        "eos_token_id": _END,
        "pad_token_id": _END,
        "decoder_start_token_id": _START,
        # The file holds halves; a CPU computes in fp32, and they are spread out on loading.
        "dtype": "float32",
    }


def _generation(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        "bos_token_id": _END,
        "eos_token_id": _END,
        "pad_token_id": _END,
        "decoder_start_token_id": _START,
        "no_timestamps_token_id": _NO_TIMESTAMPS,
        "is_multilingual": False,
        "max_length": 448,
        "suppress_tokens": settings["suppress_ids"],
        "begin_suppress_tokens": settings["suppress_ids_begin"],
        "alignment_heads": settings["alignment_heads"],
    }


def _feature_extractor(state: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "WhisperProcessor",
        "feature_size": state["model.encoder.conv1.weight"].shape[1],
        "sampling_rate": 16_000,
        "hop_length": 160,
        "chunk_length": 30,
        "n_fft": 400,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": False,
    }
