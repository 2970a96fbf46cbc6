"""`clearhead inspect` on Hugging Face folders: what it is fed is said, and what is wrong ends in one line."""

from pathlib import Path

import pytest
import torch

from clearhead.anatomy.find import anatomy_of
from clearhead.cli import main
from clearhead.errors import UserError
from clearhead.signal.inspection import inspect

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEXT = "So long as men can breathe, or eyes can see, so long lives this, and this gives life to thee. " * 40


def gpt2(**changes: object) -> torch.nn.Module:
    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "n_positions": 64, "vocab_size": 300}
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**sizes, **changes}))


def bert(**changes: object) -> torch.nn.Module:
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**sizes, "vocab_size": 300, "max_position_embeddings": 64, **changes})
    return transformers.BertForMaskedLM(config)


def save_tokenizer(folder: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=290, special_tokens=["[MASK]"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    made.train_from_iterator([TEXT], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, mask_token="[MASK]").save_pretrained(folder)


@pytest.fixture
def text(tmp_path: Path) -> str:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def run(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> tuple[int, str, str]:
    code = main(["inspect", "--model", str(folder), "--context", "32", "--out", str(folder / "report"), *more])
    captured = capsys.readouterr()
    return code, " ".join(captured.out.split()), captured.err


def refused(capsys: pytest.CaptureFixture[str], folder: Path, *more: str) -> str:
    code, _, err = run(capsys, folder, *more)
    lines = [line for line in err.splitlines() if line.startswith("clearhead:")]
    assert code == 2
    assert len(lines) == 1
    assert "Traceback" not in err
    return lines[0]


def test_text_by_the_folders_tokenizer(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    code, out, err = run(capsys, tmp_path / "model", "--data", text)
    assert code == 0, err
    assert "(the folder's tokenizer)" in out
    assert "loss kind next token" in out
    assert "Expected to train" in out


def test_a_masked_model_gets_tokens_to_fill_in(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    bert().save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    code, out, err = run(capsys, tmp_path / "model", "--data", text)
    assert code == 0, err
    assert "15% of them hidden" in out
    assert "loss kind output" in out


def test_without_tokenizer_or_weights_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2().config.save_pretrained(tmp_path / "model")
    code, out, err = run(capsys, tmp_path / "model")
    assert code == 0, err
    assert "no weights" in out
    assert "Zipf" in out


def test_weights_that_the_file_lacks_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = bert()
    whole.bert.save_pretrained(tmp_path / "model")
    whole.config.architectures = ["BertForMaskedLM"]
    whole.config.save_pretrained(tmp_path / "model")
    code, out, err = run(capsys, tmp_path / "model")
    assert code == 0, err
    assert "lacks" in out
    assert "drawn at random" in out


def test_pixels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.ViTConfig(
        num_hidden_layers=2, hidden_size=32, num_attention_heads=2, intermediate_size=64, image_size=16, patch_size=4
    )
    torch.manual_seed(0)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    code = main(["inspect", "--model", str(tmp_path / "model"), "--out", str(tmp_path / "report")])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert "normal noise" in " ".join(captured.out.split())
    assert "Expected to train" in captured.out  # the first stream is the measured one, so theory and measurement agree
    assert "--data" in refused(capsys, tmp_path / "model", "--data", "shakespeare")


def test_wrong_vocabulary(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2(vocab_size=100).save_pretrained(tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    assert "vocabulary has 100" in refused(capsys, tmp_path / "model", "--data", text)


def test_more_tokens_than_positions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2(n_positions=16).save_pretrained(tmp_path / "model")
    assert "at most 16 tokens" in refused(capsys, tmp_path / "model")


def test_broken_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = gpt2()
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    assert "not finite" in refused(capsys, tmp_path / "nan")
    gpt2().save_pretrained(tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert "cannot load" in refused(capsys, tmp_path / "cut")


@pytest.mark.parametrize("kind", ["mamba", "resnet"])
def test_models_without_attention(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if kind == "mamba":
        config = transformers.MambaConfig(num_hidden_layers=1, hidden_size=32, vocab_size=50, state_size=4)
        model = transformers.MambaForCausalLM(config)
    else:
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        model = transformers.ResNetForImageClassification(config)
    model.save_pretrained(tmp_path / "model")
    assert "no attention found" in refused(capsys, tmp_path / "model")
    with pytest.raises(UserError, match="no attention"):
        anatomy_of(model)


def test_t5_says_what_the_theory_leaves_out() -> None:
    sizes = {"num_layers": 2, "d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "vocab_size": 100}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    ids = torch.randint(0, 100, (2, 16))
    report = inspect(model, {"input_ids": ids, "decoder_input_ids": ids})
    assert any("relative position" in note for note in report.predicted.notes)


def test_advice_for_a_pre_norm_model_says_where_the_constants_go() -> None:
    report = inspect(gpt2(n_layer=12, n_embd=64, initializer_range=0.5), {"input_ids": torch.randint(0, 300, (2, 32))})
    advice = next(one for one in report.advice if "deepscale" in one.line)
    assert "go into the branches" in advice.reason
