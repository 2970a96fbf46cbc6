"""Saved and loaded: a patched model comes back as it was, and without clearhead as the plain model."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch

import clearhead as ch
from clearhead.errors import UserError
from clearhead.hf import checks, zoo
from clearhead.hf.store import FILE, MARKER
from clearhead.hf.temperatures import NAME, TemperatureOptions, temperature_parameters
from tests.anatomy.hf_models import batch_for
from tests.hf.patched import SPEC, build, ids, louder, selective, stir

transformers = pytest.importorskip("transformers")


@torch.no_grad()
def logits(model: Any, name: str) -> torch.Tensor:
    batch = {key: value for key, value in batch_for(name).items() if key != "labels"}
    if name == "t5":
        batch["decoder_input_ids"] = ids(3, 5)
    return model.eval()(**batch).logits


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "gpt_neox"])
def test_it_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    model = louder(build(name))
    ch.hf.patch(model, SPEC, temperature=TemperatureOptions(granularity="head_full"))
    stir(model)
    want = logits(model, name)
    model.save_pretrained(tmp_path)
    again = ch.hf.load(tmp_path)
    assert torch.equal(logits(again, name), want)
    assert type(again) is type(model)
    assert {name: p.shape for name, p in temperature_parameters(again).items()} == {
        name: p.shape for name, p in temperature_parameters(model).items()
    }
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / FILE).read_text() == (tmp_path / FILE).read_text()


@pytest.mark.parametrize("spec", ["laser", "self_adjust+window:6", "softmax+learned"])
def test_specs_without_selective_temperatures(spec: str, tmp_path: Path) -> None:
    model = louder(build("llama"))
    ch.hf.patch(model, spec)
    if "learned" in spec:
        stir(model)
    want = logits(model, "llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(ch.hf.load(tmp_path), "llama"), want)


@pytest.mark.full
@pytest.mark.parametrize("name", sorted(zoo.ENTRIES))
def test_every_architecture_that_takes_temperatures_comes_back(name: str, tmp_path: Path) -> None:
    try:
        model, batch = zoo.build(name), zoo.inputs(name)
        ch.hf.patch(model, SPEC, probe=batch)
    except UserError as refused:
        pytest.skip(str(refused))
    stir(model)
    model.save_pretrained(tmp_path)
    again = ch.hf.load(tmp_path, probe=batch).eval()
    with torch.no_grad():
        assert torch.equal(checks.outputs(again, batch), checks.outputs(model, batch))


def test_in_a_fresh_process_without_clearhead_and_with_it(tmp_path: Path) -> None:
    """Without, it is the plain model and transformers says what is lost; with it, the patched one."""
    for spec in (SPEC, "laser"):
        model = louder(build("llama"))
        plain = logits(model, "llama")
        ch.hf.patch(model, spec)
        if spec == SPEC:
            stir(model)
        model.save_pretrained(tmp_path / spec)
        torch.save({"plain": plain, "patched": logits(model, "llama")}, tmp_path / f"{spec}.pt")
        assert "clearhead" not in (tmp_path / spec / "config.json").read_text()
    torch.save(batch_for("llama"), tmp_path / "batch.pt")
    code = f"""
        import sys, torch, transformers
        folder = {str(tmp_path)!r} + "/"
        batch = torch.load(folder + "batch.pt", weights_only=True)
        want = {{spec: torch.load(folder + spec + ".pt", weights_only=True) for spec in ({SPEC!r}, "laser")}}
        with torch.no_grad():
            for spec in want:
                load = transformers.AutoModelForCausalLM.from_pretrained
                model, info = load(folder + spec, output_loading_info=True)
                print(*sorted(info["unexpected_keys"]))
                assert torch.equal(model(**batch).logits, want[spec]["plain"])
                assert model.config._attn_implementation == "sdpa"
            assert "clearhead" not in sys.modules
            import clearhead as ch
            for spec in want:
                assert torch.equal(ch.hf.load(folder + spec)(**batch).logits, want[spec]["patched"])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    selective_lost, laser_lost = done.stdout.splitlines()
    assert f"{MARKER}_{SPEC}" in selective_lost.split()
    assert selective_lost.count(NAME) == 8
    assert laser_lost.split() == [f"{MARKER}_laser"]
    assert f"{MARKER}_laser" in done.stderr  # transformers' own report


def test_loading_is_quiet_and_takes_keywords(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    selective("llama").float().save_pretrained(tmp_path)
    transformers.logging.set_verbosity_warning()
    try:
        model = ch.hf.load(tmp_path, dtype=torch.bfloat16)
    finally:
        transformers.logging.set_verbosity_error()
    assert "clearhead" not in capfd.readouterr().err
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert all((p != 0).any() for p in temperature_parameters(model).values())


@pytest.mark.full
def test_checkpoints_of_the_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    model, tokens = build("llama"), ids(4, 8)
    ch.hf.patch(model, SPEC)
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=2, report_to=[], use_cpu=True, per_device_train_batch_size=2,
        learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens]
    transformers.Trainer(model, arguments, train_dataset=data).train()
    again = ch.hf.load(tmp_path / "checkpoint-2")
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))
    assert all((p != 0).any() for p in temperature_parameters(again).values())


# ---- wrong use ------------------------------------------------------------------------------------------------------


def edit(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**values, **changes}))


def test_each_wrong_use_gives_one_line(tmp_path: Path) -> None:
    model = build("llama")
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(UserError, match=r"no clearhead\.json"):
        ch.hf.load(tmp_path / "plain")

    ch.hf.patch(model, SPEC)
    with pytest.raises(UserError, match="push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    folder = tmp_path / "patched"
    model.save_pretrained(folder)
    major, minor, *_ = transformers.__version__.split(".")
    edit(folder, transformers=f"{int(major) - 1}.57.0")
    with pytest.raises(UserError, match=r"patched under transformers \d+\.57\.0"):
        ch.hf.load(folder)
    edit(folder, transformers=f"{major}.{int(minor) + 1}.0")
    with pytest.warns(UserWarning, match="every layer is checked again"):
        ch.hf.load(folder)
    edit(folder, transformers=transformers.__version__, architecture="MyOwnModel")
    with pytest.raises(UserError, match="model_class=MyOwnModel"):
        ch.hf.load(folder)
    assert ch.hf.load(folder, model_class=transformers.LlamaForCausalLM).config.hidden_size == 32
    edit(folder, format=99)
    with pytest.raises(UserError, match="format 1"):
        ch.hf.load(folder)


def test_a_plain_model_saved_over_a_patched_one_is_noticed(tmp_path: Path) -> None:
    model = build("llama")
    ch.hf.patch(model, SPEC)
    model.save_pretrained(tmp_path)
    ch.hf.unpatch(model)
    model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="plain model was saved over"):
        ch.hf.load(tmp_path)


def test_unpatched_it_saves_as_the_class_does(tmp_path: Path) -> None:
    model = build("llama")
    names = set(model.state_dict())
    ch.hf.patch(model, "laser")
    ch.hf.unpatch(model)
    assert set(model.state_dict()) == names
    assert "save_pretrained" not in vars(model)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / FILE).exists()
