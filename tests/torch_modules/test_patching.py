"""Patching whole models of torch.nn: nothing is bypassed, and unpatch gives everything back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import clearhead as ch
from clearhead.errors import UserError
from clearhead.torch.mixing import counting
from clearhead.torch.multihead import PatchedMultiheadAttention

W, H, N = 16, 4, 6
PADDING = torch.tensor([[False] * N, [False, False, False, False, True, True]])
SPECS = ("softmax", "laser", "self_adjust", "window:3", "bigbird:block_size=2", "performer", "laser+selective")

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")


def encoder(**keywords: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(W, H, 32, **({"dropout": 0.0, "batch_first": True} | keywords))
    return spread(nn.TransformerEncoder(layer, 2))


def transformer(**keywords: Any) -> nn.Transformer:
    return spread(nn.Transformer(W, H, 2, 2, 32, **({"dropout": 0.0, "batch_first": True} | keywords)))


def spread(model: Any) -> Any:
    with torch.no_grad():  # clones of one layer are equal, and biases start at 0
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return model


def tokens() -> torch.Tensor:
    return torch.randn(2, N, W)


# ---- the fast path ----


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("padding", [None, PADDING], ids=["no padding", "padding"])
def test_inference_goes_through_the_patch(norm_first: bool, padding: torch.Tensor | None) -> None:
    """Evaluation without gradients is where torch would hand the weights to its fused kernel."""
    model, x = encoder(norm_first=norm_first), tokens()
    ch.torch.patch(model, "laser")
    trained_with = model.train()(x, src_key_padding_mask=padding)
    for closed in (torch.no_grad, torch.inference_mode):
        with counting() as calls, closed():
            out = model.eval()(x, src_key_padding_mask=padding)
        assert [calls[layer.self_attn] for layer in model.layers] == [1, 1]
        torch.testing.assert_close(out, trained_with.detach(), rtol=1e-5, atol=1e-5)


def test_the_plain_model_does_take_the_fast_path_here() -> None:
    """Else the test above would show nothing."""
    model, x, called = encoder().eval(), tokens(), []
    model.layers[0].self_attn.forward = lambda *a, **k: called.append(1)
    with torch.no_grad():
        model(x, src_key_padding_mask=PADDING)
    assert not called


def test_a_way_to_the_fused_kernel_that_is_not_foreseen_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder().eval()
    ch.torch.patch(model, "laser")
    monkeypatch.setattr(PatchedMultiheadAttention, "_qkv_same_embed_dim", True)
    with torch.no_grad(), pytest.raises(RuntimeError, match="bypass its patched attention"):
        model(tokens())


class Direct(nn.Module):
    """Uses the weights of its MultiheadAttention without calling it, as CLIP's attention pool does."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(W, H)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.inner
        return F.multi_head_attention_forward(
            x, x, x, W, H, own.in_proj_weight, own.in_proj_bias, None, None, False, 0.0, own.out_proj.weight,
            own.out_proj.bias,
        )[0]  # fmt: skip


def test_a_layer_that_the_probe_does_not_reach_is_named_and_nothing_stays_patched() -> None:
    model = nn.Sequential(encoder(), Direct())
    assert "not probed: 1.inner" in str(ch.torch.patch(model, "laser"))
    ch.torch.unpatch(model)
    for probe in ((tokens(),), {"input": tokens()}, [tokens()]):
        with pytest.raises(UserError, match=r"the probe never called 1.inner; .* leave it out with skip"):
            ch.torch.patch(model, "laser", probe=probe)
        assert not any(isinstance(m, PatchedMultiheadAttention) for m in model.modules())
    report = ch.torch.patch(model, "laser", probe=(tokens(),), skip=("1.*",))
    assert [layer.calls for layer in report.layers] == [1, 1]
    assert "left as they are: 1.*" in str(report)
    assert type(model[1].inner) is nn.MultiheadAttention


class Hidden(nn.Module):
    """Attends without matrices that anybody could find by their names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x)


def test_an_attention_that_only_shows_when_it_runs_is_named() -> None:
    model = nn.Sequential(encoder(), Hidden())
    ch.torch.patch(model, "softmax")  # nothing to be seen without a forward; softmax rides on the same function
    ch.torch.unpatch(model)
    for spec in ("softmax", "laser"):
        with pytest.raises(UserError, match="scaled_dot_product_attention called in Hidden, which would stay softmax"):
            ch.torch.patch(model, spec, probe=(tokens(),))
        assert not any(isinstance(m, PatchedMultiheadAttention) for m in model.modules())
    report = ch.torch.patch(model, "softmax", probe=(tokens(),), skip=("1",))
    assert len(report.layers) == 2
    assert "call scaled_dot_product_attention as before: Hidden" in str(report)


# ---- there and back ----


def everything(model: nn.Module) -> dict[str, tuple[type, list[str]]]:
    return {name: (type(m), sorted(m.__dict__)) for name, m in model.named_modules()}


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("make", [encoder, transformer])
def test_unpatch_is_the_model_of_before(spec: str, make: Callable[[], nn.Module]) -> None:
    model, x = make().eval(), tokens()
    model.get_submodule("encoder" if make is transformer else "").layers[1].dropout.train()  # a mode of its own
    arguments = (x, x) if make is transformer else (x,)
    state, before = {k: v.clone() for k, v in model.state_dict().items()}, everything(model)
    modes = [m.training for m in model.modules()]
    with torch.no_grad():
        want = [model(*arguments), model(*arguments, src_key_padding_mask=PADDING)]
    report = ch.torch.patch(model, spec)
    assert all(layer.calls == 2 for layer in report.layers)
    with torch.no_grad():
        assert torch.isfinite(model(*arguments)).all()
    ch.torch.unpatch(model)
    with torch.no_grad():
        have = [model(*arguments), model(*arguments, src_key_padding_mask=PADDING)]
    assert all(torch.equal(a, b) for a, b in zip(have, want, strict=True))
    assert everything(model) == before
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("spec", SPECS)
def test_state_dicts_are_the_models_own_but_for_temperatures(spec: str) -> None:
    model = encoder()
    keys = list(model.state_dict())
    ch.torch.patch(model, spec)
    added = [k for k in model.state_dict() if k not in keys]
    assert [k for k in model.state_dict() if k in keys] == keys
    assert bool(added) == ("selective" in spec)
    assert all("self_attn.clearhead_temperatures." in k for k in added)
    other = spread(encoder())
    ch.torch.patch(other, spec)
    other.load_state_dict(model.state_dict())
    x = tokens()
    assert torch.equal(other(x), model(x))


def test_copies_are_patched_too() -> None:
    model, x = encoder(), tokens()
    ch.torch.patch(model, "performer+laser")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
        ch.torch.unpatch(twin)
        assert type(twin.layers[0].self_attn) is nn.MultiheadAttention
    assert type(model.layers[0].self_attn) is PatchedMultiheadAttention


# ---- what it computes ----


@pytest.mark.parametrize("spec", ["softmax", "softmax+selective", "softmax+learned"])
def test_softmax_and_fresh_temperatures_change_nothing(spec: str) -> None:
    model, x = transformer(), tokens()
    causal = nn.Transformer.generate_square_subsequent_mask(N)
    keywords = {"tgt_mask": causal, "src_key_padding_mask": PADDING, "memory_key_padding_mask": PADDING}
    want = model(x, x, **keywords)
    report = ch.torch.patch(model, spec)
    torch.testing.assert_close(model(x, x, **keywords), want, rtol=1e-5, atol=2e-6)
    names = [name for name, _ in model.named_parameters() if "clearhead_temperatures" in name]
    assert report.added_parameters == sum(p.numel() for n, p in model.named_parameters() if n in names)
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert bool(names) == ("+" in spec)
    model(x, x, **keywords).square().sum().backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in names)


@pytest.mark.parametrize("spec", SPECS)
def test_a_decoder_cannot_see_the_future(spec: str) -> None:
    model, source, x = transformer().eval(), tokens(), tokens()
    report = ch.torch.patch(model, spec)
    roles = {layer.name: layer.role for layer in report.layers}
    assert roles["decoder.layers.0.self_attn"] == "causal"
    assert roles["decoder.layers.1.multihead_attn"] == "cross"
    assert roles["encoder.layers.0.self_attn"] == "bidirectional"
    if "window" in spec or "bigbird" in spec:
        assert "left out of cross attention" in str(report)
    mask = nn.Transformer.generate_square_subsequent_mask(N)  # no hint: torch's decoder finds out that it is causal
    first = model(source[:, :4], x, tgt_mask=mask)
    y = x.clone()
    y[:, 4:] += 10.0
    second = model(source[:, :4], y, tgt_mask=mask)
    torch.testing.assert_close(second[:, :4], first[:, :4], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(second[:, 4:], first[:, 4:], atol=1e-3)


def test_options_of_temperatures() -> None:
    given = {"granularity": "shared", "parts": "token", "on": ("query",)}
    for options in (given, ch.hf.TemperatureOptions(**given)):
        assert ch.torch.patch(encoder(), "softmax+selective", temperature=options).added_parameters == 2 * W
    with pytest.raises(UserError, match="options of \\+selective"):
        ch.torch.patch(encoder(), "softmax", temperature={"parts": "token"})


def test_layers_of_a_performer_draw_features_of_their_own() -> None:
    model = encoder()
    ch.torch.patch(model, "performer")
    first, second = (layer.self_attn.clearhead_features for layer in model.layers)
    assert not torch.equal(first, second)
    again = encoder()
    ch.torch.patch(again, "performer")
    assert torch.equal(again.layers[1].self_attn.clearhead_features, second)


FULL = [pytest.param(spec, marks=pytest.mark.full) for spec in ("laser", "window:3", "softmax+selective", "performer")]


@pytest.mark.parametrize("spec", ["softmax", *FULL])
def test_compiled_without_a_break(spec: str) -> None:
    torch._dynamo.reset()
    model, x = encoder().layers[0], tokens()
    ch.torch.patch(model, spec)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = nn.Transformer.generate_square_subsequent_mask(N)
    for keywords in ({"src_key_padding_mask": PADDING}, {"src_mask": mask, "is_causal": True}):
        torch.testing.assert_close(compiled(x, **keywords), model(x, **keywords), rtol=1e-5, atol=1e-5)
    compiled(x, src_key_padding_mask=PADDING).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_a_compiled_model_finds_out_about_a_wrong_hint() -> None:
    torch._dynamo.reset()
    layer, x = nn.MultiheadAttention(W, H), tokens()
    ch.torch.patch(layer, "softmax")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="is_causal=True promises"):
        compiled(x, x, x, attn_mask=torch.zeros(2, 2), is_causal=True, need_weights=False)


# ---- wrong use ----


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(W, 3 * W), nn.Linear(W, W)


class Subclass(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("make", "spec", "message"),
    [
        (encoder, "lasr", "unknown term 'lasr'.*did you mean 'laser'"),
        (lambda: nn.Linear(2, 2), "laser", "holds neither nn.MultiheadAttention nor timm's Attention; in your own"),
        (Own, "laser", r"of other classes: \(the module itself\) \(Own\)"),
        (lambda: nn.Sequential(encoder(), Own()), "laser", r"would stay as they are: 1 \(Own\); name them in skip"),
        (lambda: nn.Sequential(encoder(), Subclass(W, H)), "laser", r"would stay as they are: 1 \(Subclass\)"),
        (lambda: encoder(dropout=0.1), "laser", "layers.0.self_attn: laser refuses attention dropout"),
    ],
)
def test_wrong_use_is_one_line_and_changes_nothing(make: Callable[[], nn.Module], spec: str, message: str) -> None:
    model = make()
    before = everything(model)
    with pytest.raises(UserError, match=message) as caught:
        ch.torch.patch(model, spec)
    assert "\n" not in str(caught.value)
    assert everything(model) == before


def test_patched_twice_and_never() -> None:
    model = encoder()
    with pytest.raises(UserError, match="is not patched"):
        ch.torch.unpatch(model)
    ch.torch.patch(model, "laser")
    with pytest.raises(UserError, match=r"attends by 'laser' already; ch\.torch\.unpatch"):
        ch.torch.patch(model, "self_adjust")


def test_a_part_that_fails_leaves_no_part_behind() -> None:
    model = encoder()
    before = everything(model)
    with pytest.raises(ValueError, match="granularity"):
        ch.torch.patch(model, "softmax+selective", temperature={"granularity": "none"})
    assert everything(model) == before
    assert not any("clearhead" in name for name, _ in model.named_modules())


def test_weights_without_numbers() -> None:
    with torch.device("meta"):
        model = encoder()
    for spec in ("performer", "softmax+selective"):
        with pytest.raises(UserError, match="make the weights real, then patch"):
            ch.torch.patch(model, spec)
    report = ch.torch.patch(model, "laser")
    assert [layer.calls for layer in report.layers] == [0, 0]
    assert "not probed" in str(report)


def test_distributed_models_get_no_new_parameters() -> None:
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = encoder()
    with pytest.raises(UserError, match="patch, then wrap"):
        ch.torch.patch(wrapped, "softmax+selective")
    assert len(ch.torch.patch(wrapped, "laser").layers) == 2


def test_hugging_face_models_are_sent_to_their_own_patch() -> None:
    model = nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="bert")
    with pytest.raises(UserError, match=r"use ch\.hf\.patch"):
        ch.torch.patch(model, "laser")
