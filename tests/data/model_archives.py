"""Small made-up model files, written by the tests: CTranslate2, GGUF, a BERT .bin, and wheels that hold them."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path

import numpy as np
import torch

from clearhead.data.cache import file_sha256
from clearhead.data.models import PretrainedModel

_TYPES = {np.dtype(np.float32): 0, np.dtype(np.int8): 1, np.dtype(np.int16): 2, np.dtype(np.int32): 3}
_TYPES[np.dtype(np.float16)] = 4


def wheel(path: Path, members: dict[str, bytes]) -> Path:
    """A wheel called chfakemodel 1.0 that pip takes for one."""
    with zipfile.ZipFile(path, "w") as packed:
        for name, data in members.items():
            packed.writestr(name, data)
        info = "chfakemodel-1.0.dist-info"
        packed.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: chfakemodel\nVersion: 1.0\n")
        packed.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        packed.writestr(f"{info}/RECORD", "")
    return path


def model_of(path: Path, **changes) -> PretrainedModel:
    """An entry for such a wheel."""
    values = {
        "name": "fake",
        "about": "made up",
        "licence": "none",
        "architecture": "none",
        "parameters": 1,
        "folder_bytes": 1,
        "package": "chfakemodel",
        "version": "1.0",
        "archive": path.name,
        "sha256": file_sha256(path),
        "archive_bytes": path.stat().st_size,
        "take": ("chfakemodel/config.json", "chfakemodel/model.safetensors"),
        "convert": "copy",
    }
    return PretrainedModel(**(values | changes))


def string(text: str) -> bytes:
    """A length that counts the closing zero, the letters, the zero."""
    data = text.encode() + b"\0"
    return struct.pack("<H", len(data)) + data


def ctranslate2(arrays: dict[str, np.ndarray], aliases: dict[str, str], specification: str = "WhisperSpec") -> bytes:
    """The bytes of a CTranslate2 file of format 6."""
    parts = [struct.pack("<I", 6), string(specification), struct.pack("<II", 3, len(arrays))]
    for name, array in arrays.items():
        parts += [string(name), struct.pack("<B", array.ndim), struct.pack(f"<{array.ndim}I", *array.shape)]
        parts += [struct.pack("<BI", _TYPES[array.dtype], array.nbytes), array.tobytes()]
    parts.append(struct.pack("<I", len(aliases)))
    parts += [string(name) + string(target) for name, target in aliases.items()]
    return b"".join(parts)


def whisper_arrays(model) -> dict[str, np.ndarray]:
    """A Hugging Face Whisper's weights as CTranslate2 lays them out, in halves."""
    state = {name: value.detach().half().numpy() for name, value in model.model.state_dict().items()}
    arrays = {"decoder/embeddings/weight": state["decoder.embed_tokens.weight"]}

    def linear(old, new):
        arrays[f"{new}/weight"] = state[f"{old}.weight"]
        arrays[f"{new}/bias"] = state[f"{old}.bias"]

    def norm(old, new):
        arrays[f"{new}/gamma"], arrays[f"{new}/beta"] = state[f"{old}.weight"], state[f"{old}.bias"]

    def fused(old, new, parts):
        weights = [state[f"{old}.{part}_proj.weight"] for part in parts]
        biases = [state.get(f"{old}.{p}_proj.bias", np.zeros(len(w), np.float16)) for p, w in zip(parts, weights)]
        arrays[f"{new}/weight"], arrays[f"{new}/bias"] = np.concatenate(weights), np.concatenate(biases)

    linear("encoder.conv1", "encoder/conv1")
    linear("encoder.conv2", "encoder/conv2")
    for side in ("encoder", "decoder"):
        arrays[f"{side}/position_encodings/encodings"] = state[f"{side}.embed_positions.weight"]
        arrays[f"{side}/num_heads"] = np.array(getattr(model.config, f"{side}_attention_heads"), np.int16)
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(getattr(model.config, f"{side}_layers")):
            old, new = f"{side}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{old}.self_attn_layer_norm", f"{new}/self_attention/layer_norm")
            fused(f"{old}.self_attn", f"{new}/self_attention/linear_0", "qkv")
            linear(f"{old}.self_attn.out_proj", f"{new}/self_attention/linear_1")
            if side == "decoder":
                norm(f"{old}.encoder_attn_layer_norm", f"{new}/attention/layer_norm")
                linear(f"{old}.encoder_attn.q_proj", f"{new}/attention/linear_0")
                fused(f"{old}.encoder_attn", f"{new}/attention/linear_1", "kv")
                linear(f"{old}.encoder_attn.out_proj", f"{new}/attention/linear_2")
            norm(f"{old}.final_layer_norm", f"{new}/ffn/layer_norm")
            linear(f"{old}.fc1", f"{new}/ffn/linear_0")
            linear(f"{old}.fc2", f"{new}/ffn/linear_1")
    return arrays


def write_gguf(path: Path) -> dict[str, np.ndarray]:
    """Write a Llama of 2 layers, width 32, 4-bit matrices and 300 tokens; return what the matrices unpack to."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    width, hidden, layers, vocabulary = 32, 64, 2, 300
    file = gguf.GGUFWriter(str(path), "llama")
    file.add_context_length(64)
    file.add_embedding_length(width)
    file.add_block_count(layers)
    file.add_feed_forward_length(hidden)
    file.add_head_count(4)
    file.add_head_count_kv(2)
    file.add_layer_norm_rms_eps(1e-5)
    file.add_rope_freq_base(10_000.0)
    file.add_rope_dimension_count(width // 4)
    file.add_vocab_size(vocabulary)
    letters = sorted(ByteLevel.alphabet())
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pairs = [a + b for a in letters[60:100] for b in letters[60:62]][: vocabulary - len(letters) - len(special)]
    file.add_tokenizer_model("gpt2")
    file.add_tokenizer_pre("smollm")
    file.add_token_list(special + letters + pairs)
    file.add_token_types([3] * len(special) + [1] * (vocabulary - len(special)))
    file.add_token_merges([f"{a} {b}" for a, b in pairs])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    draw, kind = np.random.default_rng(0), gguf.GGMLQuantizationType.Q4_1
    unpacked = {}

    def matrix(name, rows, columns):
        packed = gguf.quants.quantize((draw.standard_normal((rows, columns)) * 0.05).astype(np.float32), kind)
        unpacked[name] = gguf.quants.dequantize(packed, kind)
        file.add_tensor(f"{name}.weight", packed, raw_dtype=kind)

    matrix("token_embd", vocabulary, width)
    file.add_tensor("output_norm.weight", np.ones(width, np.float32))
    for i in range(layers):
        for name in ("attn_norm", "ffn_norm"):
            file.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, np.float32))
        for name, rows, columns in (
            ("attn_q", width, width),
            ("attn_k", width // 2, width),
            ("attn_v", width // 2, width),
            ("attn_output", width, width),
            ("ffn_gate", hidden, width),
            ("ffn_up", hidden, width),
            ("ffn_down", width, hidden),
        ):
            matrix(f"blk.{i}.{name}", rows, columns)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return unpacked


def bert_members(folder: Path, *, spoil=None) -> tuple[dict[str, bytes], torch.nn.Module]:
    """config.json, pytorch_model.bin and vocab.txt of a BERT with more heads than one, and its masked-token model."""
    from transformers import BertConfig, BertForMaskedLM

    settings = {"vocab_size": 25, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"intermediate_size": 64, "max_position_embeddings": 40}
    model = BertForMaskedLM(BertConfig(**settings)).eval()
    torch.nn.init.normal_(model.cls.predictions.bias)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["cls.predictions.decoder.weight"] = state["bert.embeddings.word_embeddings.weight"].clone()
    state["cls.predictions.decoder.bias"] = state["cls.predictions.bias"].clone()
    state |= {"cls.species.weight": torch.zeros(6, 32), "bert.pooler.dense.weight": torch.zeros(32, 32)}
    state["bert.embeddings.position_ids"] = torch.arange(40)[None]
    if spoil is not None:
        spoil(state)
    torch.save(state, folder / "made.bin")
    members = {
        "m/config.json": json.dumps(settings | {"model_type": "bert", "architectures": ["Own"]}).encode(),
        "m/pytorch_model.bin": (folder / "made.bin").read_bytes(),
        "m/vocab.txt": "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY"]).encode(),
    }
    return members, model
