"""Properties of the whole decoder: causality, packing, padding, precision, compilation, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from decoder_cases import TOLERANCE, every_case, packed_documents_equal_separate_ones, padding_is_invisible


def test_equals_the_transformer_written_out_by_hand(make_model, tokens):
    model = make_model(attention="softmax", position="rope", feed_forward="swiglu", norm="rms", layers=1, heads=2)
    w = model.state_dict()

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]

    def rotate(x_bhtd):
        half = x_bhtd.shape[-1] // 2
        angle = torch.arange(x_bhtd.shape[2])[:, None] * 10000.0 ** (-torch.arange(half) / half)
        turned = torch.complex(x_bhtd[..., :half], x_bhtd[..., half:]) * torch.exp(1j * angle.double())
        return torch.cat((turned.real, turned.imag), dim=-1)

    def heads(x):
        return x.view(3, 20, 2, 12).transpose(1, 2)

    x = w["embedding.weight"][tokens]
    h = norm(x, "blocks.0.attention_residual.norm.weight")
    q, k, v = (heads(h @ w[f"blocks.0.attention.{name}.weight"].T) for name in ("query", "key", "value"))
    scores = rotate(q) @ rotate(k).mT / 12**0.5
    scores = scores.masked_fill(torch.ones(20, 20).triu(1).bool(), float("-inf"))
    mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(3, 20, 24)
    x = x + mixed @ w["blocks.0.attention.output.weight"].T
    h = norm(x, "blocks.0.feed_forward_residual.norm.weight")
    gate, up, down = (w[f"blocks.0.feed_forward.{name}.weight"] for name in ("gate", "up", "down"))
    x = x + (F.silu(h @ gate.T) * (h @ up.T)) @ down.T
    expected = norm(x, "norm.weight") @ w["embedding.weight"].T
    torch.testing.assert_close(model(tokens), expected, rtol=1e-6, atol=1e-6)  # angles are fp32 in the model


@every_case
def test_a_future_token_changes_no_earlier_logit(make_model, tokens, case):
    model = make_model(**case)
    edited = tokens.clone()
    edited[:, 12] = (edited[:, 12] + 1) % 31
    before, after = model(tokens), model(edited)
    torch.testing.assert_close(before[:, :12], after[:, :12], **TOLERANCE)
    assert (before[:, 12:] - after[:, 12:]).abs().max() > 1e-3


@every_case
def test_packed_documents_equal_separate_ones(make_model, tokens, case):
    packed_documents_equal_separate_ones(make_model(**case), tokens)


@every_case
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(make_model, tokens, case, side):
    padding_is_invisible(make_model(**case), tokens, side)


def test_padding_carries_no_gradient(make_model, tokens):
    model = make_model(attention="laser+selective", position="learned")
    valid = torch.arange(20).expand(3, -1) >= 8
    embedded = []
    model.embedding.register_forward_hook(lambda module, args, out: (out.retain_grad(), embedded.append(out))[0])
    model(tokens, valid=valid)[valid].square().sum().backward()
    assert (embedded[0].grad[:, :8] == 0).all()
    assert embedded[0].grad[:, 8:].abs().max() > 0


@pytest.mark.parametrize(
    ("attention", "position"),
    [
        *((text, "rope") for text in ("softmax", "laser", "self_adjust", "softmax+selective", "laser+learned")),
        ("softmax", "kerple"),
        ("self_adjust", "fire"),
    ],
)
def test_compiles_whole_and_gives_the_same(make_model, tokens, attention, position):
    model = make_model(attention=attention, position=position, kv_heads=2, qk_norm=True, output_gate="fixed").float()
    segments = torch.arange(20).div(8, rounding_mode="floor").expand(3, -1).contiguous()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    results = []
    for run in (model, compiled):
        model.zero_grad()
        logits = run(tokens, segments=segments)
        logits.square().mean().backward()
        results.append([logits.detach(), *(p.grad.clone() for p in model.parameters())])
    for eager, graph in zip(*results):
        torch.testing.assert_close(graph, eager, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("attention", ["softmax", "laser+selective", "self_adjust"])
def test_bf16_autocast_trains_and_decodes_with_fp32_logits(make_model, tokens, attention):
    model = make_model(attention=attention, qk_norm=True).float()
    exact = model(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)
        with torch.no_grad():
            state = model.new_state(3, 20)
            decoded = torch.cat([model(part, state=state) for part in tokens.split(7, dim=1)], dim=1)
    logits.square().mean().backward()
    assert logits.dtype == decoded.dtype == torch.float32
    assert state.caches[0].key.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    scale = exact.std()
    assert (logits - exact).abs().mean() < 0.03 * scale
    assert (decoded - logits).abs().mean() < 0.03 * scale


def test_dropout_acts_in_training_only(make_model, tokens):
    model = make_model(dropout=0.3, attention_dropout=0.2)
    assert torch.equal(model(tokens), model(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))


def test_learned_positions_end_at_the_context(make_model):
    model = make_model(position="learned", context=16)
    with pytest.raises(ValueError, match="17 of them, but learned positions end at context=16"):
        model(torch.zeros(1, 17, dtype=torch.long))
    with pytest.raises(ValueError, match="capacity: 17"):
        model.new_state(1, 17)
    assert make_model(position="rope", context=16)(torch.zeros(1, 17, dtype=torch.long)).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens_bt": torch.zeros(3, dtype=torch.long)}, "tokens: expected integers"),
        ({"tokens_bt": torch.zeros(1, 3)}, "tokens: expected integers"),
        ({"segments": torch.zeros(1, 4, dtype=torch.long)}, "segments: expected"),
        ({"valid": torch.ones(1, 3)}, "valid: expected bool"),
        ({"valid": torch.tensor([[True, False, True]])}, "must stand together"),
    ],
)
def test_refuses_what_does_not_fit(make_model, arguments, message):
    model = make_model()
    with pytest.raises(ValueError, match=message):
        model(**({"tokens_bt": torch.zeros(1, 3, dtype=torch.long)} | arguments))


def test_refuses_packed_documents_with_a_cache(make_model):
    model = make_model()
    tokens = torch.zeros(1, 3, dtype=torch.long)
    with torch.no_grad(), pytest.raises(ValueError, match="each document its own row"):
        model(tokens, segments=tokens, state=model.new_state(1, 3))
