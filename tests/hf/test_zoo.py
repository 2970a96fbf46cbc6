"""The zoo under a patch: what the table says "works" of, and whether the checks behind that word can fail."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn as nn

pytest.importorskip("transformers")

from clearhead import hf
from clearhead.errors import UserError
from clearhead.hf import checks, zoo
from clearhead.hf.listing import SPECS, try_cell
from clearhead.hf.zoo_entries import ENTRIES, Entry

TABLE = [name for name, entry in ENTRIES.items() if not entry.extra]
OWN_PROBLEMS = {("big_bird", "padding absent"), ("funnel", "padding absent")}
"""What an architecture's own attention fails: BigBird's last block is that of the padded sequence, Funnel pools it."""
SAMPLE = [
    ("gpt2", "laser"),
    ("llama", "self_adjust"),
    ("llama", "bigbird:block_size=4,random_blocks=1"),
    ("mistral", "laser"),
    ("gemma2", "softmax"),
    ("gpt_oss", "softmax"),
    ("deepseek_v3", "laser"),
    ("bert", "performer:features=16"),
    ("bert", "laser+bigbird:block_size=4,random_blocks=1"),
    ("albert", "softmax"),
    ("modernbert", "self_adjust"),
    ("t5", "softmax"),
    ("bart", "laser"),
    ("bart", "window:8"),
    ("whisper", "laser"),
    ("vit", "bigbird:block_size=4,random_blocks=1"),
    ("beit", "softmax"),
    ("wav2vec2", "laser"),
]


@pytest.mark.parametrize(("name", "spec"), SAMPLE)
def test_a_sample_of_the_table_works(name: str, spec: str) -> None:
    cell = try_cell(ENTRIES[name], spec)
    assert cell.status == "works", cell.reason
    assert set(checks.BEHAVIOUR) < set(cell.checks)


@pytest.mark.full
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", TABLE)
def test_no_cell_of_the_table_fails(name: str, spec: str) -> None:
    cell = try_cell(ENTRIES[name], spec)
    assert cell.status in ("works", "as own", "refused", "absent"), cell.reason


@pytest.mark.full
@pytest.mark.parametrize("name", TABLE)
def test_own_attention_passes_the_checks_of_behaviour(name: str) -> None:
    model = zoo.build(name)
    failed = {(name, check) for check, run in checks.BEHAVIOUR.items() if run(model, ENTRIES[name]) is not None}
    assert failed == {pair for pair in OWN_PROBLEMS if pair[0] == name}


def test_the_table_has_every_kind_and_at_least_forty_architectures() -> None:
    kinds = {kind: sum(ENTRIES[name].kind == kind for name in TABLE) for kind in ("decoder", "encoder", "seq2seq")}
    assert len(TABLE) >= 40
    assert all(count >= 8 for count in kinds.values()), kinds
    assert {entry.kind for entry in ENTRIES.values()} == {"decoder", "encoder", "seq2seq", "vision", "speech"}


def test_an_unknown_architecture_is_one_line_with_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'mistral'"):
        zoo.find("mistrl")


# ---- the checks can fail ----


@pytest.fixture
def llama() -> nn.Module:
    return zoo.build("llama")


def _with_mask(model: nn.Module, monkeypatch: pytest.MonkeyPatch, name: str, make: object) -> None:
    """Set an attention of our own on the model, registered with the mask function `make`."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, make)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", name)


def test_a_dropped_mask_is_seen_by_the_padding_checks(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    _with_mask(llama, monkeypatch, "broken_without_mask", lambda **_: None)
    assert "left padding is seen" in str(checks.padding_edit(llama, ENTRIES["llama"]))
    assert checks.future_edit(llama, ENTRIES["llama"]) is None


def test_a_dropped_mask_is_seen_in_an_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("bert")
    _with_mask(model, monkeypatch, "broken_without_mask", lambda **_: None)
    assert "padding is seen" in str(checks.padding_edit(model, ENTRIES["bert"]))
    assert "alone" in str(checks.padding_absent(model, ENTRIES["bert"]))


def test_a_leak_is_seen_by_the_future_check(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything(batch_size: int, q_length: int, kv_length: int, **_: object) -> torch.Tensor:
        return torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool)

    _with_mask(llama, monkeypatch, "broken_with_future", everything)
    assert "a later token is seen" in str(checks.future_edit(llama, ENTRIES["llama"]))
    assert "decoding through the cache differs" in str(checks.cached_decode(llama, ENTRIES["llama"]))


def test_a_causal_mask_aligned_at_the_top_is_seen_by_the_cache_check(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def top_left(batch_size: int, q_length: int, kv_length: int, **_: object) -> torch.Tensor:
        return torch.ones(q_length, kv_length, dtype=torch.bool).tril().expand(batch_size, 1, -1, -1)

    _with_mask(llama, monkeypatch, "broken_alignment", top_left)
    assert "decoding through the cache differs" in str(checks.cached_decode(llama, ENTRIES["llama"]))


def test_a_cut_graph_is_seen_by_the_gradient_check(llama: nn.Module) -> None:
    names = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    assert checks.gradients(llama, ENTRIES["llama"], names) is None
    llama.get_submodule("model.layers.1.self_attn.k_proj").register_forward_hook(lambda *call: call[2].detach())
    assert checks.gradients(llama, ENTRIES["llama"], names) == (
        "model.layers.1.self_attn.k_proj.weight gets no gradient"
    )


def test_another_attention_is_not_the_models_own() -> None:
    entry = ENTRIES["llama"]
    model = zoo.build(entry)
    before = checks.Before.of(model, entry)
    hf.patch(model, "laser")
    assert "not the model's own attention" in str(checks.equals_own(model, entry, before))
    assert "unpatch does not give back the outputs" in str(checks.unpatched(model, entry, before))
    hf.unpatch(model)
    assert checks.unpatched(model, entry, before) is None
    model.register_parameter("left_over", nn.Parameter(torch.zeros(1)))
    assert "other parameters" in str(checks.unpatched(model, entry, before))


def test_a_layer_that_the_patch_left_out_is_counted() -> None:
    entry = ENTRIES["bart"]
    model = zoo.build(entry)
    report = hf.patch(model, "laser")
    assert checks.every_layer_called(report, entry) is None
    short = dataclasses.replace(report, layers=report.layers[1:])
    assert "5 layers of attention, the architecture has 6" in str(checks.every_layer_called(short, entry))
    silent = dataclasses.replace(report, layers=(dataclasses.replace(report.layers[0], calls=0), *report.layers[1:]))
    assert "never called" in str(checks.every_layer_called(silent, entry))


# ---- what cannot be patched says so ----

IGNORE_THE_INTERFACE = {
    "xlnet": "embeddings of the distance",
    "deberta": "disentangled",
    "deberta-v2": "disentangled",
    "longformer": "overlapping windows",
    "led": "overlapping windows",
    "funnel": "pooled",
    "siglip_vision_model-pooled": "head.attention, a MultiheadAttention, does not call",
    "big_bird": "block-sparse",
}


@pytest.mark.parametrize(("name", "reason"), IGNORE_THE_INTERFACE.items())
def test_an_architecture_that_ignores_the_interface_is_never_left_unpatched_in_silence(name: str, reason: str) -> None:
    entry = ENTRIES[name]
    model = zoo.build(entry)
    before, classes = checks.Before.of(model, entry), [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=reason):
        hf.patch(model, "laser", probe=zoo.inputs(entry))
    assert checks.unpatched(model, entry, before) is None
    assert [type(module) for module in model.modules()] == classes
    with pytest.raises(UserError, match="not patched"):
        hf.unpatch(model)


def test_a_class_of_ones_own_that_ignores_the_interface_is_named(llama: nn.Module) -> None:
    class OwnAttention(type(llama.get_submodule("model.layers.0.self_attn"))):  # type: ignore[misc]
        def forward(self, hidden_states: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor, None]:
            return self.o_proj(self.q_proj(hidden_states)), None

    llama.get_submodule("model.layers.1.self_attn").__class__ = OwnAttention
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn.* does not call"):
        hf.patch(llama, "laser")


def test_an_entry_that_the_library_lacks_is_absent() -> None:
    entry = Entry("nosuch", "decoder", "NoSuchForCausalLM", "NoSuchConfig", {})
    cell = try_cell(entry, "softmax")
    assert cell.status == "absent"
    assert "has no NoSuchForCausalLM" in cell.reason
