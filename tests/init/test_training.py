"""Training: deepscale reads the training text, admin is profiled once before step 0, and resumed runs go on."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from clearhead.data.text import prepare
from clearhead.init.admin import needs_profile
from clearhead.models.io import load_model
from clearhead.train import checkpoint as store
from clearhead.train.loop import train
from tests.train.conftest import _own_cache, config, data_cache, text  # noqa: F401  (fixtures)
from tests.train.test_parallel import torchrun

DEEP = {"init": "deepscale", "layers": 4, "attention": "softmax"}
ADMIN = {"init": "admin", "norm_placement": "post", "layers": 2, "attention": "softmax"}


def stored(folder):
    return store.checkpoints(folder)[0]


def test_deepscale_reads_the_training_split(config, tmp_path):  # noqa: F811
    run = config(model=DEEP, steps=4)
    train(run, tmp_path / "run", progress=False)
    counts = np.bincount(prepare(run.data).stream("train"))
    expected = float(((counts / counts.sum()) ** 2).sum())
    about = json.loads((stored(tmp_path / "run") / "config.json").read_text())
    assert about["embedding_correlation"] == pytest.approx(expected, rel=1e-9)
    assert load_model(stored(tmp_path / "run")).config.embedding_correlation == about["embedding_correlation"]
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["embedding_correlation"] is None
    given = config(model=DEEP | {"embedding_correlation": 0.5}, steps=4)
    train(given, tmp_path / "given", progress=False)
    assert load_model(stored(tmp_path / "given")).config.embedding_correlation == 0.5


def test_admin_is_profiled_once_and_a_resumed_run_keeps_its_omega(config, tmp_path):  # noqa: F811
    whole = config(model=ADMIN, steps=8, checkpoint_every=4)
    train(whole, tmp_path / "whole", progress=False)
    early = load_model(stored(tmp_path / "whole"))
    assert not needs_profile(early)
    omegas = [p for name, p in early.named_parameters() if name.endswith("omega")]
    assert len(omegas) == 4
    assert all(float(p.detach().mean()) > 1.01 for p in omegas[1:])

    class Stop(Exception):
        pass

    def crash(event):
        if event["kind"] == "step" and event["step"] == 6:
            raise Stop

    with pytest.raises(Stop):
        train(whole, tmp_path / "cut", on_event=crash, progress=False)
    train(whole, tmp_path / "cut", progress=False)
    ours, theirs = (store.read(stored(tmp_path / name)).tensors for name in ("whole", "cut"))
    for file in (store.MODEL, store.OPTIMIZER):
        assert all(torch.equal(tensor, theirs[file][name]) for name, tensor in ours[file].items())


def test_the_profile_is_the_first_batchs(config, tmp_path):  # noqa: F811
    """The omega that training starts from is what `profile_omega` finds on the first batch."""
    from clearhead.init.admin import profile_omega
    from clearhead.models.make import build_model

    run = config(model=ADMIN | {"dropout": 0.0}, steps=2, optim={"lr": 1e-12, "warmup_steps": 1})
    train(run, tmp_path / "run", progress=False)
    batch = prepare(run.data).batch("train", run.train.batch_size, run.data.context, run.train.seed, 0)
    model = build_model(run.model, run.train.seed)
    segments = torch.from_numpy(batch.segments)
    found = profile_omega(model, {"tokens_bt": torch.from_numpy(batch.tokens), "segments": segments})["decoder"]
    trained = load_model(stored(tmp_path / "run"))
    omegas = {name: p for name, p in trained.named_parameters() if name.endswith("omega")}
    assert [float(p.detach()[0]) for p in omegas.values()] == pytest.approx(found, rel=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_share_one_profile(config, tmp_path, parallel):  # noqa: F811
    options = {"model": ADMIN | {"dropout": 0.0}, "batch_size": 4, "steps": 4, "optim": {"eps": 1e-3}}
    torchrun(tmp_path / "two", config(parallel=parallel, **options), "")
    two = load_model(stored(tmp_path / "two"))
    assert not needs_profile(two)
    for name, p in two.named_parameters():
        if name.endswith("omega"):
            assert float(p.detach().std()) < 0.05 * float(p.detach().mean())
    deep = config(parallel=parallel, **(options | {"model": DEEP | {"dropout": 0.0}}))
    torchrun(tmp_path / "deep", deep, "")
    assert load_model(stored(tmp_path / "deep")).config.embedding_correlation is not None
