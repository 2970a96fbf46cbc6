"""Stand-ins for attentions that do not use the interface: under softmax they are the model's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn
from torch import Tensor

pytest.importorskip("transformers")

from clearhead import hf
from clearhead.errors import UserError
from clearhead.hf import checks, zoo
from clearhead.hf.replace.swap import find
from clearhead.hf.replace.table import REPLACED
from clearhead.hf.zoo_entries import ENTRIES

DECODERS = (
    "gpt_neo", "gptj", "codegen", "bloom", "mpt", "falcon", "falcon-alibi", "falcon-multi-query", "xglm", "openai-gpt",
    "imagegpt",
)  # fmt: skip
OTHERS = ("mpnet", "roformer", "megatron-bert", "rembert", "big_bird-full", "swinv2", "wavlm")
GENERATE = tuple(name for name in DECODERS if name not in ("openai-gpt", "imagegpt"))
WEIGHTS = tuple(name for name in (*DECODERS, *OTHERS) if name not in ("wavlm", "falcon-alibi", "mpt"))
"""Whose own weights are per head and those of what they compute: WavLM gives their mean, Falcon's eager path with ALiBi
adds the bias twice. MPT asks no layer for weights."""


def both(name: str, **changes: Any) -> tuple[nn.Module, nn.Module]:
    """The model as it is, and patched with softmax."""
    own, ours = zoo.build(name, **changes), zoo.build(name, **changes)
    hf.patch(ours, "softmax", probe=zoo.inputs(name))
    return own, ours


def test_every_file_of_the_table_is_tested_here() -> None:
    tested = {type(zoo.build(name)).__module__.split(".")[2] for name in (*DECODERS, *OTHERS)}
    assert tested == REPLACED


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_outputs_are_the_models_own_and_unpatch_gives_back_its_classes(name: str) -> None:
    entry = ENTRIES[name]
    model = zoo.build(entry)
    before = checks.Before.of(model, entry)
    classes = {path: type(module) for path, module in model.named_modules()}
    parameters = dict(model.named_parameters())
    found = find(model)
    report = hf.patch(model, "softmax", probe=zoo.inputs(entry))
    assert found
    assert {layer.name for layer in report.layers} == set(found)
    assert checks.every_layer_called(report, entry) is None
    assert checks.equals_own(model, entry, before) is None
    assert dict(model.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[path] for path, parameter in model.named_parameters())
    hf.unpatch(model)
    assert checks.unpatched(model, entry, before) is None
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not any("clearhead" in key for module in model.modules() for key in vars(module))


@pytest.mark.parametrize("name", [*DECODERS, *OTHERS])
def test_gradients_are_the_models_own(name: str) -> None:
    entry = ENTRIES[name]
    own, ours = both(name)
    side = zoo.paddings(entry)[-1] if zoo.paddings(entry) else "none"
    batch = zoo.inputs(entry, side)
    for model in (own, ours):
        out = checks.outputs(model, batch)
        real = checks.real_tokens(model, entry, batch, out)
        weights = torch.randn(out[real].shape, generator=torch.Generator().manual_seed(5))
        (out[real] * weights).sum().backward()
    for (path, mine), theirs in zip(ours.named_parameters(), own.parameters(), strict=True):
        if theirs.grad is None:
            assert mine.grad is None or not mine.grad.any(), path
            continue
        assert mine.grad is not None, path
        scale = max(1.0, float(theirs.grad.abs().max()))
        apart = float((mine.grad - theirs.grad).abs().max())
        assert apart <= 2e-5 * scale, f"{path}: {apart} at a gradient of {scale}"


@pytest.mark.parametrize("name", DECODERS)
def test_decoding_through_the_cache_equals_the_full_forward_under_self_adjust(name: str) -> None:
    """Its weights see a constant on the scores of a query, which softmax does not."""
    model = zoo.build(name)
    hf.patch(model, "self_adjust", probe=zoo.inputs(name))
    assert checks.cached_decode(model, ENTRIES[name]) is None
    assert checks.padding_edit(model, ENTRIES[name]) is None


@pytest.mark.parametrize("name", GENERATE)
def test_generate_with_beams_and_left_padding_gives_the_models_own_tokens(name: str) -> None:
    own, ours = both(name)
    batch = zoo.inputs(name, "left")
    asked: dict[str, Any] = {"max_new_tokens": 5, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        wanted, got = (model.generate(**batch, **asked) for model in (own, ours))  # type: ignore[operator]
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_that_are_asked_for_are_the_models_own(name: str) -> None:
    entry = ENTRIES[name]
    own, ours = both(name)
    if name.startswith("falcon"):  # only its eager path keeps weights
        own.config._attn_implementation_internal = "eager"  # type: ignore[union-attr]
    with torch.no_grad():
        wanted, got = (model(**zoo.inputs(entry), output_attentions=True).attentions for model in (own, ours))
    assert len(got) == len(wanted) == entry.attentions
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


def test_weights_that_a_model_asks_no_layer_for_are_an_error_and_not_empty() -> None:
    _, ours = both("mpt")
    with pytest.raises(UserError, match="output_attentions"):
        ours(**zoo.inputs("mpt"), output_attentions=True)


@pytest.mark.parametrize(
    "name", ["gptj", "falcon", *(pytest.param(name, marks=pytest.mark.full) for name in ("bloom", "mpnet", "roformer"))]
)
def test_a_stand_in_compiles_into_one_graph(name: str) -> None:
    _, ours = both(name)
    batch = zoo.inputs(name)
    with torch.no_grad():
        wanted = checks.outputs(ours, batch)
        torch._dynamo.reset()
        compiled = torch.compile(ours, backend="eager", fullgraph=True)
        got = compiled(**batch, use_cache=False) if name not in ("mpnet", "roformer") else compiled(**batch)
    assert checks.difference(got.logits, wanted) is None


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon-alibi"])
def test_slopes_of_a_head_count_that_is_no_power_of_two(name: str) -> None:
    sizes = {"bloom": ("hidden_size", "n_head"), "mpt": ("d_model", "n_heads")}.get(
        name, ("hidden_size", "num_attention_heads")
    )
    own, ours = both(name, **dict(zip(sizes, (48, 6), strict=True)))
    for side in ("none", "left", "right"):
        batch = zoo.inputs(name, side)  # type: ignore[arg-type]
        with torch.no_grad():
            wanted, got = checks.outputs(own, batch), checks.outputs(ours, batch)
        assert checks.difference(got, wanted, checks.real_tokens(own, ENTRIES[name], batch, wanted)) is None


@pytest.mark.parametrize("name", ["gptj", "falcon", "bloom"])
def test_a_static_cache_is_not_longer_than_what_it_holds(name: str) -> None:
    from transformers import StaticCache

    _, ours = both(name)
    ids = zoo.inputs(name)["input_ids"]
    for spec in ("softmax", "softmax+window:8"):
        if spec != "softmax":
            hf.unpatch(ours)
            hf.patch(ours, spec)
        with torch.no_grad():
            whole = ours(ids).logits
            cache = StaticCache(config=ours.config, max_cache_len=64)
            pieces = [ours(ids[:, :30], past_key_values=cache, use_cache=True).logits]
            for at in range(30, 34):
                pieces.append(ours(ids[:, at : at + 1], past_key_values=cache, use_cache=True).logits)
        assert checks.difference(torch.cat(pieces, dim=1), whole[:, :34]) is None, spec


def test_dropout_of_the_original_is_kept() -> None:
    own, ours = zoo.build("gptj", attn_pdrop=0.5), zoo.build("gptj", attn_pdrop=0.5)
    for model in (own, ours):
        for module in model.modules():
            if hasattr(module, "attn_dropout"):
                module.attn_dropout.p = 0.5
    hf.patch(ours, "softmax")
    batch = zoo.inputs("gptj")
    with torch.no_grad():
        still = checks.outputs(ours.eval(), batch)
        first, second = (checks.outputs(ours.train(), batch) for _ in range(2))
    assert not torch.equal(first, second)
    assert not torch.allclose(first, still)
    hf.unpatch(ours)
    with pytest.raises(UserError, match="dropout"):
        hf.patch(ours, "laser")


def test_a_copy_of_a_patched_model_is_unpatched_by_itself() -> None:
    model = zoo.build("bloom")
    batch = zoo.inputs("bloom")
    with torch.no_grad():
        wanted = checks.outputs(model, batch)
    hf.patch(model, "laser")
    other = copy.deepcopy(model)
    hf.unpatch(other)
    with torch.no_grad():
        assert torch.equal(checks.outputs(other, batch), wanted)
        assert not torch.allclose(checks.outputs(model, batch), wanted)
    hf.unpatch(model)
    with torch.no_grad():
        assert torch.equal(checks.outputs(model, batch), wanted)


def test_two_models_patched_with_different_specs_do_not_meet() -> None:
    first, second = zoo.build("gptj"), zoo.build("gptj")
    batch = zoo.inputs("gptj")
    hf.patch(first, "laser")
    with torch.no_grad():
        alone = checks.outputs(first, batch)
        hf.patch(second, "self_adjust")
        assert torch.equal(checks.outputs(first, batch), alone)
        assert not torch.allclose(checks.outputs(second, batch), alone)


def test_a_forward_with_hooks_on_a_swapped_module_still_calls_them() -> None:
    model = zoo.build("gptj")
    seen: list[Tensor] = []
    attention = model.get_submodule("transformer.h.0.attn")
    attention.register_forward_hook(lambda module, given, got: seen.append(got[0]))
    hf.patch(model, "laser")
    seen.clear()
    with torch.no_grad():
        checks.outputs(model, zoo.inputs("gptj"))
    assert len(seen) == 1
