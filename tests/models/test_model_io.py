from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from clearhead.errors import UserError
from clearhead.models.io import load_model, save_model


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tie", [True, False])
def test_save_and_load_is_the_identity(make_model, tokens, tmp_path, tie, dtype):
    model = make_model(attention="laser+selective", tie_embeddings=tie, norm="layer", output_gate="head").to(dtype)
    save_model(model, tmp_path / "new" / "folder")
    loaded = load_model(tmp_path / "new" / "folder")
    assert loaded.config == model.config
    assert not loaded.training
    assert (loaded.head.weight is loaded.embedding.weight) == tie
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
    assert torch.equal(model(tokens), loaded(tokens))
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == ["config.json", "model.safetensors"]


def test_state_dict_is_the_identity(make_model, tokens):
    model = make_model(attention="softmax+selective", seed=0)
    other = make_model(attention="softmax+selective", seed=1)
    other.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens), other(tokens))
    assert other.head.weight is other.embedding.weight


def test_a_tied_matrix_is_stored_once(make_model, tmp_path):
    save_model(make_model(tie_embeddings=True), tmp_path)
    assert "head.weight" not in load_file(tmp_path / "model.safetensors")


def test_a_failed_save_leaves_the_old_model(make_model, tmp_path, monkeypatch):
    model = make_model()
    save_model(model, tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()

    def half_a_file(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("clearhead.models.io.save_file", half_a_file)
    with pytest.raises(UserError, match=r"disk full.*what was there before is untouched"):
        save_model(make_model(seed=1), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def broken(how, folder, make_model):
    weights, config = folder / "model.safetensors", folder / "config.json"
    if how == "no config":
        config.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "cut config":
        config.write_text(config.read_text()[:20])
    elif how == "config is a list":
        config.write_text("[]")
    elif how == "misspelt option":
        config.write_text(json.dumps({"atention": "laser"}))
    elif how == "another model's config":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"rope_base": 500.0}))
    elif how == "another model's weights":
        other = make_model(width=48)
        save_file({k: v for k, v in other.state_dict().items() if k != "head.weight"}, weights)
    elif how == "a weight is missing":
        tensors = load_file(weights)
        del tensors["norm.weight"]
        save_file(tensors, weights)
    elif how == "a weight too many":
        save_file(load_file(weights) | {"extra": torch.zeros(1)}, weights)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no config", "config.json is missing"),
        ("no weights", "model.safetensors is missing"),
        ("cut weights", "is broken"),
        ("cut config", "cannot be read"),
        ("config is a list", "expected a JSON object"),
        ("misspelt option", "did you mean 'attention'?"),
        ("another model's config", "another config"),
        ("another model's weights", "has shape"),
        ("a weight is missing", "lacks norm.weight"),
        ("a weight too many", "has unknown extra"),
    ],
)
def test_a_broken_folder_is_told_in_one_line(make_model, tmp_path, how, message):
    save_model(make_model(), tmp_path)
    broken(how, tmp_path, make_model)
    with pytest.raises(UserError) as caught:
        load_model(tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrapped_model_is_refused(make_model, tmp_path):
    with pytest.raises(TypeError, match=r"Seq2Seq\), got OptimizedModule"):
        save_model(torch.compile(make_model(), backend="eager"), tmp_path)


def test_a_model_of_an_older_version_lacks_the_newer_options(make_model, tokens, tmp_path):
    model = make_model()
    save_model(model, tmp_path)
    newer = ("architecture", "decoder_layers", "share_embeddings", "segment_types", "relative_buckets")
    config = {key: value for key, value in model.config.to_dict().items() if key not in newer}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"config": json.dumps(config)})
    assert torch.equal(load_model(tmp_path)(tokens), model(tokens))
