"""A patched nn.MultiheadAttention against torch's own, argument by argument."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import clearhead as ch
from clearhead.torch.mixing import counting

B, N, W, H = 2, 5, 16, 4


def attention(**keywords: Any) -> nn.MultiheadAttention:
    layer = nn.MultiheadAttention(W, H, **({"batch_first": True} | keywords))
    with torch.no_grad():  # torch starts biases at 0, which would hide a mistake in them
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return layer


def pair(spec: str = "softmax", **keywords: Any) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    plain = attention(**keywords)
    patched = copy.deepcopy(plain)
    ch.torch.patch(patched, spec)
    return plain, patched


def gradients(layer: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    names, parameters = zip(*layer.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def agree(plain: Any, patched: Any, inputs: tuple[torch.Tensor, ...], **masks: Any) -> None:
    for need in (True, False):
        want, want_weights = plain(*inputs, need_weights=need, **masks)
        have, have_weights = patched(*inputs, need_weights=need, **masks)
        torch.testing.assert_close(have, want, rtol=1e-5, atol=2e-6)
        assert (have_weights is None) == (want_weights is None)
        if need:
            torch.testing.assert_close(have_weights, want_weights, rtol=1e-5, atol=2e-6)
        probe = torch.randn_like(want)
        theirs, ours = gradients(plain, (want * probe).sum()), gradients(patched, (have * probe).sum())
        assert theirs.keys() == ours.keys()
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=2e-5, msg=name)


LAYERS = [
    {},
    {"batch_first": False},
    {"bias": False},
    {"kdim": 6, "vdim": 10},
    {"kdim": 6, "vdim": 10, "bias": False},
    {"add_bias_kv": True},
    {"add_zero_attn": True, "add_bias_kv": True},
]


@pytest.mark.parametrize("keywords", LAYERS, ids=str)
@pytest.mark.parametrize("source", ["itself", "other"])
def test_softmax_is_torchs_own(keywords: dict[str, Any], source: str) -> None:
    plain, patched = pair(**keywords)
    shape = (B, N) if plain.batch_first else (N, B)
    x = torch.randn(*shape, W)
    if "kdim" in keywords or source == "other":
        longer = (B, N + 2) if plain.batch_first else (N + 2, B)
        inputs = (x, torch.randn(*longer, plain.kdim), torch.randn(*longer, plain.vdim))
    else:
        inputs = (x, x, x)
    agree(plain, patched, inputs)
    padding = torch.zeros(B, inputs[1].shape[plain.batch_first], dtype=torch.bool)
    padding[0, 2:4] = True
    agree(plain, patched, inputs, key_padding_mask=padding)


def masks(kind: str) -> dict[str, torch.Tensor]:
    hidden = torch.rand(N, N) < 0.4
    hidden.fill_diagonal_(False)
    each = torch.rand(B * H, N, N) < 0.4
    each.diagonal(dim1=1, dim2=2).fill_(False)
    padding = torch.tensor([[False] * N, [False, False, False, True, True]])
    return {
        "bool": {"attn_mask": hidden},
        "bool per head": {"attn_mask": each},
        "float": {"attn_mask": torch.randn(N, N)},
        "float hides": {"attn_mask": torch.randn(B * H, N, N).masked_fill(each, float("-inf"))},
        "padding": {"key_padding_mask": padding},
        "float padding": {"key_padding_mask": torch.randn(B, N).masked_fill(padding, float("-inf"))},
        "both": {"attn_mask": torch.ones(N, N, dtype=torch.bool).triu(1), "key_padding_mask": padding},
        "float both": {"attn_mask": torch.randn(N, N), "key_padding_mask": torch.randn(B, N)},
    }[kind]


KINDS = ("bool", "bool per head", "float", "float hides", "padding", "float padding", "both", "float both")


@pytest.mark.parametrize("kind", KINDS)
def test_masks_mean_what_they_mean_in_torch(kind: str) -> None:
    plain, patched = pair()
    x = torch.randn(B, N, W)
    agree(plain, patched, (x, x, x), **masks(kind))


def test_a_learned_mask_gets_its_gradient() -> None:
    plain, patched = pair()
    x, mask = torch.randn(B, N, W), torch.randn(N, N, requires_grad=True)
    found = [
        torch.autograd.grad(layer(x, x, x, attn_mask=mask)[0].square().sum(), mask)[0] for layer in (plain, patched)
    ]
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


def test_unbatched_input_and_weights_of_each_head() -> None:
    plain, patched = pair(batch_first=False)
    x, padding = torch.randn(N, W), torch.tensor([False] * 4 + [True])
    for keywords in ({}, {"average_attn_weights": False}):
        for have, want in zip(
            patched(x, x, x, key_padding_mask=padding, **keywords),
            plain(x, x, x, key_padding_mask=padding, **keywords),
            strict=True,
        ):
            assert have.shape == want.shape
            torch.testing.assert_close(have, want, rtol=1e-5, atol=2e-6)


def test_laser_and_its_weights_are_the_formula() -> None:
    _, patched = pair("laser")
    x = torch.randn(B, N, W)
    out, weights = patched(x, x, x, average_attn_weights=False)
    q, k, v = (
        t.view(B, N, H, W // H).transpose(1, 2)
        for t in F.linear(x, patched.in_proj_weight, patched.in_proj_bias).chunk(3, -1)
    )
    a = (q @ k.mT / math.sqrt(W // H)).softmax(-1)
    want = patched.out_proj((a @ v.exp()).log().transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights, a, rtol=1e-5, atol=1e-6)


SPECS = (
    "softmax",
    "laser",
    "self_adjust",
    "window:3",
    "bigbird:block_size=1,global_blocks=0,random_blocks=1",
    "performer",
    "softmax+learned",
)
SPECS += ("softmax+selective", "laser+selective")


@pytest.mark.parametrize("spec", SPECS)
def test_padding_is_invisible_and_may_hold_anything(spec: str) -> None:
    _, patched = pair(spec)
    padding = torch.tensor([[False] * 6, [True, False, False, False, True, True]])
    x = torch.randn(B, 6, W)
    first = patched(x, x, x, key_padding_mask=padding, need_weights=False)[0]
    source = x.masked_fill(padding[..., None], float("nan"))
    second = patched(x, source, source, key_padding_mask=padding, need_weights=False)[0]
    torch.testing.assert_close(second, first)
    alone = x[1:, 1:4]
    torch.testing.assert_close(first[1, 1:4], patched(alone, alone, alone)[0][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_the_hint_makes_attention_causal(spec: str) -> None:
    """With the causal mask beside it, of either type, or alone; an edit of the future leaves the past as it is."""
    _, patched = pair(spec)
    x = torch.randn(B, 6, W)
    as_bool = torch.ones(6, 6, dtype=torch.bool).triu(1)
    as_float = nn.Transformer.generate_square_subsequent_mask(6)
    outs = [patched(x, x, x, attn_mask=m, is_causal=True)[0] for m in (as_bool, as_float, None)]
    torch.testing.assert_close(outs[1], outs[0])
    torch.testing.assert_close(outs[2], outs[0])
    y = x.clone()
    y[:, 4:] += 10.0
    edited = patched(y, y, y, attn_mask=as_float, is_causal=True)[0]
    torch.testing.assert_close(edited[:, :4], outs[0][:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(edited[:, 4:], outs[0][:, 4:], atol=1e-3)


def test_a_wrong_hint_is_not_believed() -> None:
    plain, patched = pair()
    x, mask = torch.randn(B, N, W), torch.zeros(N, N)
    mask[0, 3] = float("-inf")
    torch.testing.assert_close(
        patched(x, x, x, attn_mask=mask, is_causal=True)[0], plain(x, x, x, attn_mask=mask)[0], rtol=1e-5, atol=2e-6
    )


def test_what_is_remembered_of_a_mask_ends_with_a_change_of_it() -> None:
    _, patched = pair("performer")
    x, mask = torch.randn(B, N, W), nn.Transformer.generate_square_subsequent_mask(N)
    patched(x, x, x, attn_mask=mask, is_causal=True)
    mask[0, 1] = 0.0
    with pytest.raises(ValueError, match="causality is is_causal=True"):
        patched(x, x, x, attn_mask=mask, is_causal=True)


def test_performer_refuses_what_it_cannot_add() -> None:
    _, patched = pair("performer")
    x = torch.randn(B, N, W)
    with pytest.raises(ValueError, match="performer never makes a score to add to"):
        patched(x, x, x, key_padding_mask=torch.randn(B, N))
    with pytest.raises(ValueError, match="causality is is_causal=True"):
        patched(x, x, x, attn_mask=torch.rand(N, N) < 0.3)
    padding = torch.zeros(B, N).index_fill(1, torch.tensor([4]), float("-inf"))  # what torch's encoders make of bool
    assert torch.isfinite(patched(x, x, x, key_padding_mask=padding)[0]).all()


def test_a_query_without_keys_gives_nothing_instead_of_nan() -> None:
    _, patched = pair("laser")
    x = torch.randn(B, N, W, requires_grad=True)
    padding = torch.tensor([[True] * N, [False] * N])
    out, weights = patched(x, x, x, key_padding_mask=padding)
    torch.testing.assert_close(out[0], patched.out_proj.bias.expand(N, W))
    assert (weights[0] == 0).all()
    out.sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, x: f(x, x, x, attn_mask=torch.zeros(3, 3)), r"attn_mask: expected \(5, 5\) or \(8, 5, 5\), got"),
        (lambda f, x: f(x, x, x, key_padding_mask=torch.zeros(5, 2)), "key_padding_mask: expected"),
        (lambda f, x: f(x, x, x, attn_mask=torch.zeros(5, 5).long()), "expected bool"),
        (lambda f, x: f(x, x[0], x), "all batched"),
        (lambda f, x: f(*[torch.nested.nested_tensor([x[0], x[1, :3]])] * 3), "no nested tensors"),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_wrong_inputs_say_what_was_expected(call: Any, message: str) -> None:
    _, patched = pair("laser")
    with pytest.raises((ValueError, TypeError), match=message):
        call(patched, torch.randn(B, N, W))


def test_a_pattern_over_another_text_is_refused() -> None:
    _, patched = pair("window:3")
    with pytest.raises(ValueError, match="counts distances within one text"):
        patched(torch.randn(B, N, W), *[torch.randn(B, N + 1, W)] * 2)


@pytest.mark.parametrize("name", ["add_bias_kv", "add_zero_attn"])
@pytest.mark.parametrize("spec", ["window:3", "performer", "softmax+selective"])
def test_a_key_that_stands_nowhere_is_refused_where_places_count(name: str, spec: str) -> None:
    with pytest.raises(ValueError, match=f"{name} adds a key that stands nowhere"):
        ch.torch.patch(attention(**{name: True}), spec)
    _, patched = pair("laser", **{name: True})
    x = torch.randn(B, N, W)
    assert torch.isfinite(patched(x, x, x, is_causal=True)[0]).all()


@pytest.mark.parametrize("spec", ["laser", "performer"])
def test_attention_dropout_is_refused_before_anything_changes(spec: str) -> None:
    layer = attention(dropout=0.1)
    with pytest.raises(ValueError, match=f"{spec} refuses attention dropout, and this layer has 0.1"):
        ch.torch.patch(layer, spec)
    assert type(layer) is nn.MultiheadAttention
    ch.torch.patch(layer, "self_adjust")
    x = torch.randn(B, N, W)
    assert not torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])
    layer.eval()
    assert torch.equal(layer(x, x, x)[0], layer(x, x, x)[0])


@pytest.mark.parametrize("spec", ["laser", "self_adjust+selective", "performer"])
def test_autocast(spec: str) -> None:
    _, patched = pair(spec)
    x = torch.randn(B, N, W)
    want = patched(x, x, x)[0]
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = patched(x, x, x)
        causal = patched(x, x, x, attn_mask=mask, is_causal=True)[0]
    assert out.dtype == weights.dtype == causal.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), want, rtol=0.05, atol=0.05)


def test_every_call_is_counted() -> None:
    _, patched = pair()
    x = torch.randn(B, N, W)
    with counting() as calls, torch.no_grad():
        patched.eval()(x, x, x)  # where torch's own would go to its fused kernel
    assert calls == {patched: 1}
