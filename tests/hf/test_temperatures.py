"""Selective Self-Attention on pretrained models: identity at the start, and exact with caches, padding and beams."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import clearhead as ch
from clearhead.errors import UserError
from clearhead.hf import temperatures
from clearhead.hf.options import TemperatureOptions
from clearhead.hf.temperatures import NAME, freeze_all_but_temperatures, temperature_parameters
from tests.anatomy.hf_models import batch_for
from tests.hf.patched import SPEC, build, ids, in_chunks, louder, selective, stir

pytest.importorskip("transformers")

ALL = ("llama", "gpt2", "bert", "t5", "bart", "whisper", "vit", "gpt_neox", "phi3", "qwen3", "gemma2", "olmo2")
DECODERS = ("llama", "gpt2", "gpt_neox", "phi3", "qwen3")
WINDOWED = {"mistral": {"sliding_window": 4}, "gemma2": {"sliding_window": 4}}
CLOSE = {"rtol": 1e-6, "atol": 1e-6}


# ---- at the start ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_identity_at_the_start_and_living_gradients(name: str) -> None:
    model, batch = build(name).eval(), batch_for(name)
    with torch.no_grad():
        before = model(**batch).logits
    report = ch.hf.patch(model, SPEC)
    out = model(**batch)
    torch.testing.assert_close(out.logits, before, rtol=0, atol=1e-6)

    out.loss.backward() if out.loss is not None else out.logits.square().mean().backward()
    found = temperature_parameters(model)
    assert len(found) == 4 * len(report.layers)
    for path, parameter in found.items():
        assert parameter.grad is not None, path
        assert parameter.grad.abs().sum() > 0, path
    assert report.added_parameters == sum(p.numel() for p in found.values())


def test_under_half_a_percent_of_the_parameters() -> None:
    for granularity, least in (("head_slice", 0.0), ("shared", 0.0), ("head_full", 0.0005)):
        model = build("gpt2", n_embd=128, vocab_size=2000)
        report = ch.hf.patch(model, SPEC, temperature=TemperatureOptions(granularity=granularity))
        assert least <= report.added_parameters / report.parameters < 0.005


def test_learned_temperatures_start_as_the_identity() -> None:
    model, batch = build("llama").eval(), batch_for("llama")
    with torch.no_grad():
        before = model(**batch).logits
    report = ch.hf.patch(model, "softmax+learned")
    out = model(**batch).logits
    torch.testing.assert_close(out, before, rtol=0, atol=1e-6)
    out.square().mean().backward()
    assert report.added_parameters == 8
    assert all(p.grad is not None and (p.grad != 0).all() for p in temperature_parameters(model).values())


def test_the_papers_slope_changes_little_and_the_linear_one_nothing() -> None:
    model, tokens = louder(build("gpt2")).eval(), ids(2, 12)
    with torch.no_grad():
        before = model(tokens).logits
        ch.hf.patch(model, SPEC, temperature=TemperatureOptions(slope="sigmoid"))
        change = (model(tokens).logits - before).abs().max()
    assert 1e-5 < change < 0.1


# ---- what tau is ----------------------------------------------------------------------------------------------------


def test_tau_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 + tanh(vector . GELU(projection)) + slope ln n, written out: grouped queries, left padding."""
    model = selective("llama")
    taus: list[Any] = []
    of = temperatures.of
    monkeypatch.setattr(temperatures, "of", lambda *a, **k: taus.append(of(*a, **k)) or taus[-1])
    inputs: list[torch.Tensor] = []
    model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    tokens = ids(2, 8)
    mask = torch.ones_like(tokens)
    mask[1, :3] = 0
    with torch.no_grad():
        model(tokens, attention_mask=mask)
        attention = model.model.layers[0].self_attn
        own = getattr(attention, NAME)
        n = mask.cumsum(-1).clamp_min(1).log()[:, None]
        for tau, matrix, part, heads in (
            (taus[0].query, attention.q_proj, own.query, 4),
            (taus[0].value, attention.v_proj, own.value, 2),
        ):
            x_bthd = F.gelu(matrix(inputs[0])).unflatten(-1, (heads, 8))
            token = torch.tanh(torch.einsum("bthd,hd->bht", x_bthd, part.token.vector))
            want = 1 + token + part.position.slope * n
            assert tau.shape == (2, heads, 8, 1)
            torch.testing.assert_close(tau[0, ..., 0], want[0])
            torch.testing.assert_close(tau[1, :, 3:, 0], want[1, :, 3:])
    assert (taus[0].query - 1).abs().max() > 0.1


@pytest.mark.parametrize(
    "options",
    [
        TemperatureOptions(granularity="shared"),
        TemperatureOptions(granularity="head_full", slope="sigmoid"),
        TemperatureOptions(parts="token", on=("value",)),
        TemperatureOptions(parts="position"),
        TemperatureOptions(on=("query",)),
    ],
    ids=str,
)
def test_every_option_decodes_as_it_reads(options: TemperatureOptions) -> None:
    model, tokens = louder(build("gpt_neox")).double().eval(), ids(2, 9)
    with torch.no_grad():
        before = model(tokens).logits
        report = ch.hf.patch(model, SPEC, temperature=options)
        stir(model)
        full = model(tokens).logits
    parts = len(options.parts.split("+")) * len(options.on)
    assert len(temperature_parameters(model)) == parts * len(report.layers)
    assert (full - before).abs().max() > 1e-3
    torch.testing.assert_close(in_chunks(model, tokens, (4, 1, 2, 2)), full, **CLOSE)


def test_under_autocast() -> None:
    model, tokens = build("llama").eval(), ids(2, 9)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(tokens).logits
        ch.hf.patch(model, SPEC)
        out = model(tokens, labels=tokens)
    torch.testing.assert_close(out.logits, before, rtol=0, atol=2e-3)
    out.loss.backward()
    for path, parameter in temperature_parameters(model).items():
        assert parameter.grad is not None, path
        assert parameter.grad.dtype == torch.float32
        assert (parameter.grad != 0).any(), path


# ---- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_cached_decoding_equals_the_full_forward(name: str) -> None:
    model, tokens = selective(name), ids(2, 12)
    with torch.no_grad():
        full = model(tokens).logits
    torch.testing.assert_close(in_chunks(model, tokens, (5, 1, 1, 3, 2)), full, **CLOSE)


@pytest.mark.parametrize("name", list(WINDOWED))
@pytest.mark.parametrize("left", [0, 3])
def test_cached_decoding_past_a_window(name: str, left: int) -> None:
    """The cache drops what a window has passed; a value's place is still counted from its first real token."""
    model, tokens = selective(name, **WINDOWED[name]), ids(2, 14)
    mask = torch.ones_like(tokens)
    mask[0, :left] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        full = model(tokens, attention_mask=mask, position_ids=positions).logits
    chunks = in_chunks(model, tokens, (5, 1, 1, 3, 1, 1, 2), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(chunks[1], full[1], **CLOSE)
    torch.testing.assert_close(chunks[0, left:], full[0, left:], **CLOSE)


def test_static_cache() -> None:
    from transformers import StaticCache

    model, tokens = selective("llama"), ids(2, 9)
    with torch.no_grad():
        full = model(tokens).logits
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch.testing.assert_close(in_chunks(model, tokens, (4, 1, 2, 2), past_key_values=cache), full, **CLOSE)


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_cached_cross_attention_equals_the_full_forward(name: str) -> None:
    """Cross attention's values are made once; their temperatures are right at every later step."""
    model = selective(name)
    batch = {key: value for key, value in batch_for(name).items() if key != "labels"}
    if name == "whisper":
        batch["input_features"] = batch["input_features"].double()
    rows = next(iter(batch.values())).shape[0]
    target = ids(rows, 6)
    with torch.no_grad():
        full = model(**batch, decoder_input_ids=target).logits
        cache, steps = None, []
        for at in range(6):
            out = model(**batch, decoder_input_ids=target[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            steps.append(out.logits)
    torch.testing.assert_close(torch.cat(steps, dim=1), full, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_beams(name: str) -> None:
    model = selective(name)
    tokens = ids(2, 7)
    mask = torch.ones_like(tokens)
    mask[1, :2] = 0 if name != "t5" else 1
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    cached = model.generate(tokens, attention_mask=mask, use_cache=True, **options)
    plain = model.generate(tokens, attention_mask=mask, use_cache=False, **options)
    assert torch.equal(cached, plain)


# ---- padding, documents ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECODERS)
def test_left_padding_is_invisible(name: str) -> None:
    model, tokens = selective(name), ids(1, 9)
    with torch.no_grad():
        alone = model(tokens).logits
        padded = torch.cat((torch.full((1, 4), 11), tokens), dim=1)
        mask = torch.tensor([[0] * 4 + [1] * 9])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        out = model(padded, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(out[:, 4:], alone, **CLOSE)


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_right_padding_is_invisible(name: str) -> None:
    model, tokens = selective(name), ids(1, 9)
    padded = torch.cat((tokens, torch.full((1, 4), 11)), dim=1)
    mask = torch.tensor([[1] * 9 + [0] * 4])
    more = {} if name == "bert" else {"decoder_input_ids": ids(1, 5, seed=8)}
    with torch.no_grad():
        alone = model(tokens, **more).logits
        out = model(padded, attention_mask=mask, **more).logits
    torch.testing.assert_close(out[:, : alone.shape[1]], alone, **CLOSE)


@pytest.mark.parametrize(("name", "changes"), [("llama", {}), ("mistral", WINDOWED["mistral"])])
def test_packed_documents_are_each_alone(name: str, changes: dict[str, Any]) -> None:
    model, first, second = selective(name, **changes), ids(1, 7), ids(1, 6, seed=9)
    positions = torch.cat((torch.arange(7), torch.arange(6)))[None]
    with torch.no_grad():
        packed = model(torch.cat((first, second), dim=1), position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(packed[:, :7], model(first).logits, **CLOSE)
        torch.testing.assert_close(packed[:, 7:], model(second).logits, **CLOSE)


# ---- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, tokens = selective("gpt2").train(), ids(2, 10)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    grads = []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(tokens, labels=tokens).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert any(NAME in name for name in grads[0])
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-6)


def test_temperatures_alone_in_fp32_beside_bf16_weights() -> None:
    model, tokens = build("llama").to(torch.bfloat16), ids(2, 10)
    ch.hf.patch(model, SPEC)
    count = freeze_all_but_temperatures(model, dtype=torch.float32)
    left = [name for name, p in model.named_parameters() if p.requires_grad]
    assert count == sum(p.numel() for p in temperature_parameters(model).values())
    assert left == list(temperature_parameters(model))
    optimizer = torch.optim.AdamW(temperature_parameters(model).values(), lr=1e-2, weight_decay=0.0)
    first = last = 0.0
    for step in range(8):
        loss = model(tokens, labels=tokens).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        first, last = (loss.item(), last) if step == 0 else (first, loss.item())
    assert last < first
    with pytest.raises(UserError, match="has no temperatures"):
        freeze_all_but_temperatures(build("llama"))


@pytest.mark.full
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_compiled_in_one_graph(name: str) -> None:
    model, tokens = selective(name), ids(2, 10)
    mask = torch.ones_like(tokens)
    mask[1, 7:] = 0
    with torch.no_grad():
        want = model(tokens, attention_mask=mask).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens, attention_mask=mask).logits, want, **CLOSE)


# ---- taking it back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_unpatched_is_as_it_was(name: str) -> None:
    model, tokens = build(name).eval(), ids(2, 8)
    with torch.no_grad():
        before = model(tokens).logits
        names = list(model.state_dict())
        hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m.__dict__)) for m in model.modules()]
        ch.hf.patch(model, SPEC)
        temperatures_there = [key for key in model.state_dict() if NAME in key]
        model(tokens)
        ch.hf.unpatch(model)
        assert torch.equal(model(tokens).logits, before)
    assert temperatures_there
    assert list(model.state_dict()) == names
    assert [(len(m._forward_hooks), len(m._forward_pre_hooks), set(m.__dict__)) for m in model.modules()] == hooks


def pickled(model: Any) -> Any:
    held = io.BytesIO()
    torch.save(model, held)
    held.seek(0)
    return torch.load(held, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
def test_a_copy_has_its_own(again: Callable[[Any], Any], tmp_path: Path) -> None:
    model, tokens = selective("gpt2"), ids(1, 8)
    twin = again(model)
    with torch.no_grad():
        want = model(tokens).logits
        for parameter in temperature_parameters(model).values():
            parameter.zero_()
        assert torch.equal(twin(tokens).logits, want)
        assert (model(tokens).logits - want).abs().max() > 1e-3
        twin.save_pretrained(tmp_path)
        assert torch.equal(ch.hf.load(tmp_path, dtype=torch.float64)(tokens).logits, want)
        ch.hf.unpatch(model)
        assert torch.equal(twin(tokens).logits, want)


# ---- wrong use ------------------------------------------------------------------------------------------------------


def test_options_say_what_is_wrong() -> None:
    with pytest.raises(UserError, match="did you mean 'head_slice'"):
        TemperatureOptions(granularity="head_slices")
    with pytest.raises(UserError, match="holds keys after rotary"):
        TemperatureOptions(on=("query", "key"))
    with pytest.raises(UserError, match="'query', 'value' or both"):
        TemperatureOptions(on=())
    with pytest.raises(UserError, match="unknown temperature option 'slop'"):
        TemperatureOptions.from_dict({"slop": "linear"})
    assert TemperatureOptions(on="value+query").on == ("query", "value")  # type: ignore[arg-type]
    assert TemperatureOptions.from_dict(TemperatureOptions(parts="token").to_dict()) == TemperatureOptions(
        parts="token"
    )


def test_a_fused_matrix_that_lies_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from clearhead.anatomy import hugging_face

    monkeypatch.setattr(hugging_face, "INTERLEAVED", set())  # as for a family that nobody has described yet
    model = build("gpt_neox")
    names = list(model.state_dict())
    with pytest.raises(UserError, match=r"layers\.0\.attention.*do not lie as expected"):
        ch.hf.patch(model, SPEC)
    assert list(model.state_dict()) == names


def test_a_query_matrix_with_more_than_queries_is_refused() -> None:
    from clearhead.hf.projections import projections_of

    model = build("llama")
    attention = model.model.layers[1].self_attn
    attention.q_proj = torch.nn.Linear(32, 64, bias=False)  # as where a gate lies among the queries
    with pytest.raises(UserError, match=r"layers\.1\.self_attn .*64 rows, expected 4 heads of 8"):
        projections_of(model, ["model.layers.1.self_attn"])
