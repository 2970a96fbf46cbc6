"""timm: a class for `attn_layer`, and built models. With timm itself when it can be imported (it needs torchvision)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn as nn

import clearhead as ch
from clearhead.errors import UserError
from clearhead.torch.mixing import counting
from clearhead.torch.vision import is_timm_attention
from tests.torch_modules import blocks

try:
    from timm.models.vision_transformer import VisionTransformer
except Exception:  # absent, or with a torchvision that does not fit this torch
    VisionTransformer = None

W, H, N = 16, 4, 6
needs_timm = pytest.mark.skipif(VisionTransformer is None, reason="pip install timm (and a torchvision that fits)")
OPTIONS = [{}, {"qk_norm": True}, {"scale_norm": True}, {"gated": True}, {"qkv_bias": False, "proj_bias": False}]
SPECS = ("laser", "self_adjust", "window:3", "bigbird:block_size=2", "performer", "softmax+selective", "laser+learned")


def built(spec: str | None, **keywords: Any) -> nn.Module:
    layer = blocks.Attention if spec is None else ch.torch.timm_attention(spec)
    return blocks.Block(W, H, layer, **keywords)


@pytest.mark.parametrize("keywords", OPTIONS, ids=str)
def test_softmax_is_timms_own_and_weights_fit(keywords: dict[str, Any]) -> None:
    plain, ours = built(None, **keywords), built("softmax", **keywords)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, N, W)
    for masks in (
        {},
        {"is_causal": True},
        {"attn_mask": torch.rand(2, 1, N, N).add(torch.eye(N)) > 0.4},  # True = attend
        {"attn_mask": torch.randn(1, H, N, N)},
        {"attn_mask": torch.eye(N).bool() | (torch.rand(N, N) > 0.4)},
    ):
        want, have = plain(x, **masks), ours(x, **masks)
        torch.testing.assert_close(have, want, rtol=1e-5, atol=2e-6)
        probe = torch.randn_like(want)
        grads = [torch.autograd.grad((y * probe).sum(), m.parameters()) for y, m in ((want, plain), (have, ours))]
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("spec", SPECS)
def test_each_spec_attends_as_it_says(spec: str) -> None:
    block, x = built(spec), torch.randn(2, N, W)
    block.eval()
    first = block(x, is_causal=True)
    y = x.clone()
    y[:, 4:] = torch.randn(2, 2, W)
    torch.testing.assert_close(block(y, is_causal=True)[:, :4], first[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(block(y)[:, :4], block(x)[:, :4], atol=1e-4) or "window" in spec
    block(x).square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in block.parameters())


def test_temperatures_start_without_effect_and_are_in_the_state() -> None:
    plain, ours = built(None, qk_norm=True), built("softmax+selective", qk_norm=True)
    missing = ours.load_state_dict(plain.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert missing.missing_keys
    assert all(key.startswith("attn.clearhead_temperatures.") for key in missing.missing_keys)
    x = torch.randn(2, N, W)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=2e-6)


def test_classes() -> None:
    made = ch.torch.timm_attention("laser")
    assert made is ch.torch.timm_attention("laser")
    assert issubclass(made, nn.Module)  # timm asks for a class, no partial
    with pytest.raises(UserError, match="unknown term"):
        ch.torch.timm_attention("lazer")
    with pytest.raises(UserError, match="attn_layer: laser refuses attention dropout"):
        built("laser", attn_drop=0.1)
    block = built("laser")
    with pytest.raises(UserError, match="attends by 'laser' already; build the model with another attn_layer"):
        ch.torch.patch(block, "softmax")
    assert not is_timm_attention(built(None).attn)  # a class of that name from elsewhere may be anything
    with pytest.raises(UserError, match=r"other classes: attn \(Attention\)"):
        ch.torch.patch(built(None), "laser")


def test_a_built_layer_of_timms_class() -> None:
    """The patch of a built model, on a class that says it is timm's."""
    kind = type("Attention", (blocks.Attention,), {"__module__": "timm.layers.attention"})
    block, x = blocks.Block(W, H, kind), torch.randn(2, N, W)
    before = block(x)
    report = ch.torch.patch(block, "softmax", probe=(x,))
    assert [(layer.name, layer.calls) for layer in report.layers] == [("attn", 1)]
    torch.testing.assert_close(block(x), before, rtol=1e-5, atol=2e-6)
    ch.torch.unpatch(block)
    assert torch.equal(block(x), before)
    assert type(block.attn) is kind


# ---- timm itself ----


def vit(**keywords: Any) -> Any:
    return VisionTransformer(img_size=16, patch_size=4, embed_dim=W, depth=2, num_heads=H, num_classes=3, **keywords)


@needs_timm
@pytest.mark.parametrize("keywords", [{}, {"qk_norm": True}, {"scale_attn_norm": True}], ids=str)
def test_a_vision_transformer_built_with_our_class(keywords: dict[str, Any]) -> None:
    plain, ours = vit(**keywords), vit(attn_layer=ch.torch.timm_attention("softmax"), **keywords)
    ours.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-5, atol=1e-5)
    for spec in SPECS:
        out = vit(attn_layer=ch.torch.timm_attention(spec), **keywords)(x)
        assert torch.isfinite(out).all()


@needs_timm
@pytest.mark.parametrize("spec", SPECS)
def test_a_built_vision_transformer_there_and_back(spec: str) -> None:
    model, x = vit(class_token=True, qk_norm=True).eval(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        want = model(x)
        report = ch.torch.patch(model, spec, probe=(x,))
        assert [layer.name for layer in report.layers] == ["blocks.0.attn", "blocks.1.attn"]
        assert all(layer.calls == 1 for layer in report.layers)
        twin = copy.deepcopy(model)
        with counting() as calls:
            out = model(x)
        assert len(calls) == 2
        assert torch.equal(twin(x), out)
        if spec == "softmax+selective":
            torch.testing.assert_close(out, want, rtol=1e-5, atol=1e-5)
        else:
            assert torch.isfinite(out).all()
        ch.torch.unpatch(model)
        assert torch.equal(model(x), want)


@needs_timm
def test_attentions_that_are_no_such_class_are_named() -> None:
    import timm

    with pytest.raises(UserError, match=r"blocks\.0\.attn"):
        ch.torch.patch(vit(attn_layer="diff"), "laser")
    pooled = vit(global_pool="map", class_token=False)
    with pytest.raises(UserError, match=r"would stay as they are: attn_pool \(AttentionPoolLatent\)"):
        ch.torch.patch(pooled, "laser")
    report = ch.torch.patch(pooled, "laser", skip=("attn_pool",), probe=(torch.randn(1, 3, 16, 16),))
    assert len(report.layers) == 2
    with pytest.raises(UserError, match="WindowAttention"):
        ch.torch.patch(timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1), num_heads=(1, 1)), "laser")
