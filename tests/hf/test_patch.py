"""`patch` against the model's own attention, and `unpatch`."""

from __future__ import annotations

import copy

import pytest
import torch

import clearhead as ch
from clearhead.errors import UserError
from tests.anatomy import hf_models
from tests.hf.tools import DROPOUT, SPARSE, answer, batch_of, build, eager, shape_of

NAMES = ("llama", "gpt2", "gpt_neox", "bert", "t5", "bart", "whisper", "vit", "mistral-window", "gemma3-window")


@pytest.mark.parametrize("name", NAMES)
def test_softmax_equals_the_models_own_attention(name):
    """The patched model under plain softmax is the model; every other test of masks stands on this."""
    model, batch = build(name), batch_of(name)
    own = answer(model, batch)
    report = ch.hf.patch(model, "softmax")
    assert report.implementation == model.config._attn_implementation == "clearhead_softmax"
    assert (answer(model, batch) - own).abs().max() < 1e-10
    ch.hf.unpatch(model)
    assert torch.equal(answer(model, batch), own)


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_softmax_equals_eager_attention_in_float32(name):
    model, batch = build(name, double=False), batch_of(name, "right", double=False)
    eager(model)
    own = answer(model, batch)
    ch.hf.patch(model, "softmax")
    assert (answer(model, batch) - own).abs().max() < 1e-5


@pytest.mark.parametrize("spec", ["laser", "self_adjust", "softmax+window:4", SPARSE, "performer"])
def test_another_spec_reaches_every_layer_and_unpatch_leaves_no_trace(spec):
    model, batch = build("llama"), batch_of("llama", "left")
    before, own = shape_of(model), answer(model, batch)
    report = ch.hf.patch(model, spec)
    assert [layer.name for layer in report.layers] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
    assert all(layer.calls == 1 and layer.role == "causal" for layer in report.layers)
    changed = answer(model, batch)
    assert changed.isfinite().all()
    assert (changed - own).abs().max() > 1e-4
    ch.hf.unpatch(model)
    assert shape_of(model) == before
    assert torch.equal(answer(model, batch), own)


def test_roles_of_an_encoder_decoder():
    report = ch.hf.patch(build("t5"), "softmax")
    roles = {layer.name.split(".")[-1] + " " + layer.name.split(".")[0]: layer.role for layer in report.layers}
    assert roles == {
        "SelfAttention encoder": "bidirectional",
        "SelfAttention decoder": "causal",
        "EncDecAttention decoder": "cross",
    }
    assert "position_bias" in report.layers[0].keywords
    assert "EncDecAttention" in str(report)


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_a_pattern_leaves_cross_attention_whole_and_says_so(name):
    """A window of 1 lets a token see itself: only whole cross attention brings the source's first token to the last."""
    model, batch = build(name), batch_of(name)
    report = ch.hf.patch(model, "softmax+window:1")
    assert any("cross attention" in note for note in report.notes)
    encoder_input = next(iter(batch))
    changed = dict(batch)
    changed[encoder_input] = batch[encoder_input].clone()
    changed[encoder_input][..., 0] += 1
    assert (answer(model, batch)[:, -1] - answer(model, changed)[:, -1]).abs().max() > 1e-10


@pytest.mark.parametrize("name", ["gptj", "falcon", "bloom", "gpt_neo"])
def test_a_model_that_ignores_the_interface_is_refused_by_the_name_of_its_layer(name, monkeypatch):
    """Where nothing stands in for its classes."""
    monkeypatch.setattr("clearhead.hf.patching.find", lambda model, spec: {})
    model = build(name)
    before = shape_of(model)
    with pytest.raises(UserError, match=r"(h\.0\.|layers\.0\.).*does not call") as caught:
        ch.hf.patch(model, "laser")
    assert "\n" not in str(caught.value)
    assert shape_of(model) == before


def test_wrong_use_is_one_line_each():
    model = build("llama")
    with pytest.raises(UserError, match="did you mean 'softmax'"):
        ch.hf.patch(model, "softmx")
    with pytest.raises(UserError, match="not patched"):
        ch.hf.unpatch(model)
    ch.hf.patch(model, "laser")
    with pytest.raises(UserError, match=r"patched with 'laser' already; unpatch\(model\) first"):
        ch.hf.patch(model, "softmax")
    with pytest.raises(UserError, match="expected a model of transformers"):
        ch.hf.patch(torch.nn.Linear(2, 2), "laser")


@pytest.mark.parametrize(("name", "option"), DROPOUT.items())
def test_dropout_on_weights_is_refused_for_laser_when_the_model_is_patched(name, option):
    model = build(name, **{option: 0.1})
    before = shape_of(model)
    with pytest.raises(UserError, match=f"refuses dropout on attention weights.*{option}=0.0"):
        ch.hf.patch(model, "laser")
    assert shape_of(model) == before
    ch.hf.patch(model, "softmax")
    ch.hf.patch(build(name), "laser")


def test_dropout_on_weights_is_refused_for_laser_at_the_call():
    model = build("llama")
    ch.hf.patch(model, "laser")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn: laser refuses attention dropout"):
        model.train()(**batch_of("llama"))


@pytest.mark.parametrize("version", ["5.16.2", "4.57.0"])
def test_an_old_transformers_is_refused(monkeypatch, version):
    import transformers

    monkeypatch.setattr(transformers, "__version__", version)
    with pytest.raises(UserError, match=f"transformers {version} is too old"):
        ch.hf.patch(build("llama"), "laser")


def test_a_newer_transformers_warns_and_the_report_says_so(monkeypatch):
    import transformers

    monkeypatch.setattr(transformers, "__version__", "5.99.0")
    with pytest.warns(UserWarning, match="newer than 5.23"):
        report = ch.hf.patch(build("llama"), "laser")
    assert "5.99.0" in report.notes[0]


def test_the_probe_leaves_no_trace_in_the_random_state_or_the_modes():
    model = build("bert")
    model.train()
    model.bert.encoder.layer[0].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(7)
    ch.hf.patch(model, "softmax")
    drawn = torch.rand(1)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.rand(1))
    assert [module.training for module in model.modules()] == modes


def test_a_copy_of_a_patched_model_is_patched_on_its_own():
    model, batch = build("llama"), batch_of("llama")
    own = answer(model, batch)
    ch.hf.patch(model, "laser")
    copied = copy.deepcopy(model)
    assert torch.equal(answer(copied, batch), answer(model, batch))
    ch.hf.unpatch(copied)
    assert torch.equal(answer(copied, batch), own)
    assert not torch.equal(answer(model, batch), own)


def test_two_models_of_one_class_hold_different_attentions():
    first, second, batch = build("llama"), build("llama"), batch_of("llama")
    own = answer(first, batch)
    ch.hf.patch(first, "laser")
    assert torch.equal(answer(second, batch), own)
    ch.hf.patch(second, "self_adjust")
    assert (answer(first, batch) - answer(second, batch)).abs().max() > 1e-4


def test_towers_that_words_do_not_reach_are_probed_alone():
    """A language model that sees pictures: the made-up words reach its decoder, made-up pictures its tower."""
    import transformers

    text = transformers.LlamaConfig(**hf_models.MODELS["llama"][2])
    vision = transformers.CLIPVisionConfig(**hf_models.MODELS["vit"][2])
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=5)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    before = shape_of(model)
    report = ch.hf.patch(model, "laser")
    assert len(report.layers) == 4
    assert {layer.role for layer in report.layers} == {"causal", "bidirectional"}
    ch.hf.unpatch(model)
    assert shape_of(model) == before


def test_a_part_of_a_patched_model_is_not_patched_again():
    model = build("llama")
    ch.hf.patch(model, "laser")
    with pytest.raises(UserError, match="belongs to a model that is patched already"):
        ch.hf.patch(model.model, "softmax")
    ch.hf.unpatch(model)
    ch.hf.patch(model.model, "softmax")
    with pytest.raises(UserError, match=r"^model is patched with 'softmax' already"):
        ch.hf.patch(model, "laser")


def test_a_probe_of_ones_own():
    model = build("vit")
    with pytest.raises(UserError, match="probe="):
        ch.hf.patch(model, "laser", probe={"pixel_values": torch.zeros(1, 3, 5, 5)})
    ch.hf.patch(model, "laser", probe=batch_of("vit"))


@pytest.mark.parametrize("name", ["llama", "t5", "vit"])
def test_another_attention_set_over_a_patch_is_an_error_not_a_lost_patch(name):
    model, batch = build(name), batch_of(name)
    own = answer(model, batch)
    ch.hf.patch(model, "laser")
    laser = answer(model, batch)
    model.set_attn_implementation("eager")
    with pytest.raises(UserError, match=r"set to 'eager' after it was patched with 'laser'"):
        answer(model, batch)
    ch.hf.unpatch(model)
    assert torch.equal(answer(model, batch), own)
    assert not torch.equal(laser, own)
