from __future__ import annotations

import errno
import json
import os

import pytest
import torch

from clearhead.errors import UserError
from clearhead.models.io import load_model
from clearhead.train import checkpoint as store
from clearhead.train.loop import train


@pytest.fixture
def stopped(config, tmp_path):
    """A run with whole checkpoints at steps 4 and 8, stopped after step 9 by an exception of the caller."""
    run = tmp_path / "run"

    def stop(event):
        if event["kind"] == "step" and event["step"] == 9:
            raise RuntimeError("stopped by the test")

    with pytest.raises(RuntimeError, match="stopped by the test"):
        train(config(), run, on_event=stop, progress=False)
    return run


def steps(run):
    return [int(folder.name[5:]) for folder in store.checkpoints(run)]


def test_two_are_kept_and_they_are_models(stopped):
    assert steps(stopped) == [8, 4]
    newest = store.read(store.checkpoints(stopped)[0])
    model = load_model(store.newest_model(stopped))
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, newest.tensors[store.MODEL][name])
    assert newest.step == 8
    assert len(newest.tensors[store.HISTORY]["loss"]) == 8


def test_nothing_in_it_is_a_pickle(stopped):
    for path in store.checkpoints(stopped)[0].iterdir():
        assert path.suffix in (".json", ".safetensors")


@pytest.mark.parametrize("name", [store.MODEL, store.OPTIMIZER, store.HISTORY, store.STATE, store.MODEL_CONFIG])
@pytest.mark.parametrize("harm", ["cut", "flip", "remove"])
def test_a_damaged_file_is_noticed(stopped, name, harm):
    path = store.checkpoints(stopped)[0] / name
    harm_file(path, harm)
    with pytest.raises(store.Broken):
        store.read(path.parent)
    assert store.newest_model(stopped).name == "step-00000004"


def test_flipped_bits_are_noticed_wherever_they_are(stopped):
    path = store.checkpoints(stopped)[0] / store.STATE
    good = path.read_bytes()
    for position in range(0, len(good), 41):
        path.write_bytes(flip(good, position))
        with pytest.raises(store.Broken):
            store.read(path.parent)


def test_a_damaged_checkpoint_falls_back_with_a_warning(stopped, config, tmp_path):
    harm_file(store.checkpoints(stopped)[0] / store.MODEL, "flip")
    with pytest.warns(UserWarning, match=r"step-00000008 is damaged: model.safetensors .* hash; going on from step 4"):
        resumed = train(config(), stopped, progress=False)
    assert resumed.status == "finished"
    whole = train(config(), tmp_path / "whole", progress=False)
    assert weights(stopped) == weights(tmp_path / "whole")
    assert resumed.summary["test_bits_per_byte"] == whole.summary["test_bits_per_byte"]


def test_no_whole_checkpoint_is_one_clear_line(stopped, config):
    for folder in store.checkpoints(stopped):
        harm_file(folder / store.OPTIMIZER, "cut")
    with pytest.raises(
        UserError, match=r"no checkpoint can be read .*bytes of.* remove .*checkpoint to train"
    ) as caught:
        train(config(), stopped, progress=False)
    assert "\n" not in str(caught.value)
    assert steps(stopped) == [8, 4]


def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(stopped, config, monkeypatch):
    good = store.read(store.checkpoints(stopped)[0])
    flush, full = os.fsync, []

    def fail(handle):
        if "step-" in os.readlink(f"/proc/self/fd/{handle}"):
            full.append(handle)
            raise OSError(errno.ENOSPC, "No space left on device")
        flush(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match="checkpoint at step 12: no space left on the disk") as caught:
        train(config(), stopped, progress=False)
    assert full
    assert "\n" not in str(caught.value)
    assert steps(stopped) == [8, 4]
    assert store.read(store.checkpoints(stopped)[0]).state == good.state
    assert not list((stopped / store.FOLDER).glob(".*"))
    monkeypatch.undo()


def test_checkpoint_of_another_format_is_refused(stopped):
    path = store.checkpoints(stopped)[0] / store.STATE
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"format": 99}))
    with pytest.raises(store.Broken, match="format 99"):
        store.read(path.parent)


def test_no_model_yet(tmp_path):
    with pytest.raises(UserError, match="no checkpoint yet"):
        store.newest_model(tmp_path)


def harm_file(path, harm):
    data = path.read_bytes()
    if harm == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif harm == "flip":
        path.write_bytes(flip(data, len(data) // 2))
    else:
        path.unlink()


def flip(data, position):
    return data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :]


def weights(run):
    return (store.newest_model(run) / store.MODEL).read_bytes()
