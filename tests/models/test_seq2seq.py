"""The encoder-decoder: a causal decoder that sees all of a source, its cache, its padding, its start."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from decoder_cases import CASES, IDS, TOLERANCE

from clearhead.models.config import ModelConfig
from clearhead.models.io import load_model, save_model
from clearhead.models.make import build_model
from clearhead.models.seq2seq import Seq2Seq

SEQ2SEQ = [
    {key: value + 2 if key == "relative_buckets" else value for key, value in case.items()}
    | {"architecture": "seq2seq"}
    for case in CASES
]
every_case = pytest.mark.parametrize("case", SEQ2SEQ, ids=IDS)
BASE = ModelConfig(architecture="seq2seq", vocab_size=31, layers=2, width=24, heads=4, context=32)


@pytest.fixture
def source() -> torch.Tensor:
    return torch.randint(0, 31, (3, 13), generator=torch.Generator().manual_seed(2))


@every_case
def test_a_future_target_changes_no_earlier_logit_and_any_source_token_all(make_model, source, tokens, case):
    model = make_model(**case)
    before = model(source, tokens)
    edited = tokens.clone()
    edited[:, 12] = (edited[:, 12] + 1) % 31
    after = model(source, edited)
    torch.testing.assert_close(before[:, :12], after[:, :12], **TOLERANCE)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3
    for place in (0, 12):  # cross attention has no window
        edited = source.clone()
        edited[:, place] = (edited[:, place] + 1) % 31
        assert ((before - model(edited, tokens)).abs().amax(dim=(0, 2)) > 1e-10).all()


@every_case
@pytest.mark.parametrize("cuts", [[1] * 20, [7, 1, 1, 5, 6]], ids=["by token", "in chunks"])
@torch.no_grad()
def test_cached_equals_full_and_the_source_is_read_once(make_model, source, tokens, case, cuts):
    model = make_model(**case)
    valid = torch.arange(13) < torch.tensor([[13], [6], [1]])
    state = model.new_state(3, 24)
    reads = []
    model.encoder.blocks[0].register_forward_hook(lambda *_: reads.append("encoder"))
    model.decoder.blocks[0].cross_attention.key.register_forward_hook(lambda *_: reads.append("keys"))
    parts = tokens.split(cuts, dim=1)
    decoded = [model(source, parts[0], source_valid=valid, state=state)]
    decoded += [model(None, part, state=state) for part in parts[1:]]
    assert reads == ["encoder", "keys"]
    torch.testing.assert_close(torch.cat(decoded, dim=1), model(source, tokens, source_valid=valid), **TOLERANCE)


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_source_and_target_is_invisible(make_model, source, tokens, case, side):
    model = make_model(**case)
    sizes = [(13, 20), (6, 9), (1, 1)]
    noise = torch.Generator().manual_seed(5)
    padded_s, padded_t = (torch.randint(0, 31, shape, generator=noise) for shape in ((3, 13), (3, 20)))
    valid_s, valid_t = torch.zeros(3, 13, dtype=torch.bool), torch.zeros(3, 20, dtype=torch.bool)
    for row, (s, t) in enumerate(sizes):
        place_s = slice(13 - s, 13) if side == "left" else slice(0, s)
        place_t = slice(20 - t, 20) if side == "left" else slice(0, t)
        padded_s[row, place_s], padded_t[row, place_t] = source[row, :s], tokens[row, :t]
        valid_s[row, place_s] = valid_t[row, place_t] = True
    logits = model(padded_s, padded_t, source_valid=valid_s, valid=valid_t)
    assert logits.isfinite().all()
    for row, (s, t) in enumerate(sizes):
        alone = model(source[row : row + 1, :s], tokens[row : row + 1, :t])
        torch.testing.assert_close(logits[row][valid_t[row]], alone[0], **TOLERANCE)
    if side == "right":  # no real target token sees what stands right of it
        unmasked = model(padded_s, padded_t, source_valid=valid_s)
        torch.testing.assert_close(unmasked[valid_t], logits[valid_t], **TOLERANCE)


@torch.no_grad()
def test_a_state_is_reordered_with_its_source(make_model, source, tokens):
    model = make_model(architecture="seq2seq", attention="softmax+selective")
    valid = torch.arange(13) < torch.tensor([[13], [6], [9]])
    state = model.new_state(3, 20)
    model(source, tokens[:, :8], source_valid=valid, state=state)
    index = torch.tensor([2, 0, 0, 1])
    state.reorder(index)
    following = torch.randint(0, 31, (4, 3))
    expected = model(source[index], torch.cat((tokens[index, :8], following), 1), source_valid=valid[index])[:, 8:]
    torch.testing.assert_close(model(None, following, state=state), expected, **TOLERANCE)
    with pytest.raises(ValueError, match="reset all"):
        state.reset(torch.tensor([0]))
    state.reset()
    fresh = model(source[index], following, state=state)
    torch.testing.assert_close(fresh, model(source[index], following), **TOLERANCE)


def test_cross_attention_by_hand(make_model, source, tokens):
    """One head, no positions: softmax(q(x) k(states)^T / sqrt(d)) v(states), of the source's last states."""
    model = make_model(architecture="seq2seq", layers=1, heads=1, position="none", attention="softmax+window:3")
    look = model.decoder.blocks[0].cross_attention
    assert look.spec.text == "softmax"
    seen = []
    look.register_forward_hook(lambda module, args, out: seen.append((args[0], args[1], out)))
    model(source, tokens)
    x, states, out = seen[0]
    torch.testing.assert_close(states, model.encode(source))
    w = {name: getattr(look, name).weight for name in ("query", "key", "value", "output")}
    weights = (x @ w["query"].T @ (states @ w["key"].T).mT / 24**0.5).softmax(-1)
    torch.testing.assert_close(out, weights @ (states @ w["value"].T) @ w["output"].T)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("tie", [True, False])
def test_tables_are_shared_saved_once_and_loaded(make_model, source, tokens, tmp_path, share, tie):
    from safetensors.torch import load_file

    model = make_model(architecture="seq2seq", share_embeddings=share, tie_embeddings=tie, decoder_layers=1, layers=3)
    assert (model.encoder.embedding is model.decoder.embedding) == share
    assert (model.decoder.head.weight is model.decoder.embedding.weight) == tie
    save_model(model, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(t.shape == (31, 24) for t in stored.values()) == 1 + (not share) + (not tie)
    loaded = load_model(tmp_path)
    assert isinstance(loaded, Seq2Seq)
    assert (len(loaded.encoder.blocks), len(loaded.decoder.blocks)) == (3, 1)
    assert (loaded.encoder.embedding is loaded.decoder.embedding) == share
    assert torch.equal(loaded(source, tokens), model(source, tokens))


def test_every_parameter_gets_a_gradient_and_has_a_place():
    options = {"attention": "softmax+selective", "position": "t5", "output_gate": "head", "embedding_norm": True}
    for placement in ("pre", "post"):
        model = build_model(dataclasses.replace(BASE, norm_placement=placement, decoder_layers=1, **options), 0)
        model.init_parameters(0)
        loss = model(torch.randint(0, 31, (2, 9)), torch.randint(0, 31, (2, 8))).square().mean()
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
        listed = [id(p) for group in model.parameter_groups() for p in group["params"]]
        assert sorted(listed) == sorted(id(p) for p in model.parameters())
        counts = model.count_parameters()
        assert counts.pop("total") == sum(counts.values()) == sum(p.numel() for p in model.parameters())
        assert counts["cross_attention"] == 4 * 24 * 24
        assert "other" not in counts


def test_standard_start_looks_at_the_depth_of_each_stack():
    config = dataclasses.replace(BASE, width=64, heads=4, layers=2, decoder_layers=6)
    model = build_model(config, 1)
    encoder, decoder = model.encoder.blocks[0].attention.output, model.decoder.blocks[0].cross_attention.output
    assert encoder.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert decoder.weight.std().item() == pytest.approx(0.02 / math.sqrt(18), rel=0.05)  # three branches a layer


def test_operations_agree_with_torch(make_model):
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from clearhead.models.accounting import mean_visible_keys

    model = make_model(architecture="seq2seq", decoder_layers=1, layers=3).float()
    tokens = torch.zeros(3, 20, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens, tokens).sum().backward()
    masked_half = 3 * 4 * 4 * 6 * (20 - mean_visible_keys(model.config, 20))
    assert counter.get_total_flops() / 60 == pytest.approx(model.flops_per_token(20) + masked_half)


def test_compiles_whole(make_model, source, tokens):
    model = make_model(architecture="seq2seq", attention="softmax+selective", position="t5").float()
    valid = torch.arange(13) < torch.tensor([[13], [6], [1]])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(
        compiled(source, tokens, source_valid=valid), model(source, tokens, source_valid=valid), rtol=2e-5, atol=2e-5
    )


@torch.no_grad()
def test_bf16_autocast_decodes_with_fp32_logits(make_model, source, tokens):
    model = make_model(architecture="seq2seq", position="t5").float()
    exact = model(source, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        state = model.new_state(3, 20)
        parts = tokens.split(7, dim=1)
        decoded = [model(source, parts[0], state=state), *(model(None, part, state=state) for part in parts[1:])]
    found = torch.cat(decoded, dim=1)
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean() < 0.05 * exact.std()


def test_refusals(make_model, source, tokens):
    model = make_model(architecture="seq2seq")
    with torch.no_grad():
        state = model.new_state(3, 20)
        with pytest.raises(ValueError, match="only a state that has read one"):
            model(None, tokens, state=state)
        with pytest.raises(ValueError, match="batch sizes differ, got 2 and 3"):
            model(source[:2], tokens)
        model(source, tokens[:, :1], state=state)
        with pytest.raises(ValueError, match="has read its source already"):
            model(source, tokens[:, 1:2], state=state)
        with pytest.raises(ValueError, match="together with the source"):
            model(None, tokens[:, 1:2], source_valid=source > 0, state=state)
    with pytest.raises(ValueError, match="only a state"):
        model(None, tokens)
    with pytest.raises(ValueError, match="learned positions end at context=32"):
        make_model(architecture="seq2seq", position="learned")(torch.zeros(1, 33, dtype=torch.long), tokens[:1])
