"""Adapters beside temperatures: PEFT trains, saves and merges them as it does any other module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import clearhead as ch
from clearhead.errors import UserError
from clearhead.hf.temperatures import NAME, temperature_parameters
from tests.hf.patched import SPEC, build, ids, in_chunks, louder

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

TARGETS = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"]}


def adapted(name: str) -> Any:
    """A patched model in float64 with LoRA on what makes queries and values, and trained temperatures."""
    model = louder(build(name)).double()
    ch.hf.patch(model, SPEC)
    config = peft.LoraConfig(r=4, target_modules=TARGETS[name], modules_to_save=[NAME], fan_in_fan_out=name == "gpt2")
    return peft.get_peft_model(model, config)


def train(model: Any, steps: int = 3) -> None:
    model.train()
    tokens = ids(2, 10)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.0)
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=ids(2, 9)).logits


@pytest.mark.parametrize("name", list(TARGETS))
def test_lora_and_temperatures(name: str, tmp_path: Path) -> None:
    model = adapted(name)
    trained = [path for path, p in model.named_parameters() if p.requires_grad]
    assert {"lora_A", "lora_B", NAME} == {part for path in trained for part in path.split(".")} & {
        "lora_A", "lora_B", "base_layer", NAME,
    }  # fmt: skip
    assert all("lora_" in path or NAME in path for path in trained)
    temperatures = temperature_parameters(model)
    assert set(temperatures) == {path for path in trained if NAME in path}

    before = {path: p.detach().clone() for path, p in model.named_parameters()}
    train(model)
    for path, parameter in model.named_parameters():
        assert torch.equal(parameter, before[path]) != (path in trained), path
    want = logits(model)

    torch.testing.assert_close(in_chunks(model, ids(2, 9), (4, 1, 3, 1)), want, rtol=1e-6, atol=1e-6)

    model.save_pretrained(tmp_path)
    base = louder(build(name)).double()
    ch.hf.patch(base, SPEC)
    again = peft.PeftModel.from_pretrained(base, tmp_path)
    torch.testing.assert_close(logits(again), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", list(TARGETS))
def test_a_temperature_reads_the_adapted_projection(name: str, tmp_path: Path) -> None:
    """With the adapter merged into the weights the model answers the same, and is saved whole."""
    model = adapted(name)
    train(model)
    want = logits(model)
    with model.disable_adapter():
        assert (logits(model) - want).abs().max() > 1e-3
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), want, rtol=1e-6, atol=1e-6)
    merged.save_pretrained(tmp_path)
    again = ch.hf.load(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(again), want, rtol=1e-6, atol=1e-6)
    ch.hf.unpatch(merged)
    assert not any(NAME in path for path in merged.state_dict())


def test_adapters_first_is_refused_by_name() -> None:
    model = peft.get_peft_model(build("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UserError, match=r"patch the model first, add adapters"):
        ch.hf.patch(model.base_model.model, SPEC)
