"""The twins of PyTorch's scaled_dot_product_attention: its signature, its masks, and where they differ on purpose."""

from __future__ import annotations

import inspect
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead import functional as C
from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.attention.spec import SelfAdjust

TWINS = {"softmax": C.softmax_attention, "laser": C.laser_attention, "self_adjust": C.self_adjust_attention}
twins = pytest.mark.parametrize("name", TWINS)
# From the documentation of torch.nn.functional.scaled_dot_product_attention, a builtin that `inspect` cannot read.
SIGNATURE = {
    "query": inspect.Parameter.empty, "key": inspect.Parameter.empty, "value": inspect.Parameter.empty,
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False,
}  # fmt: skip


def qkv(n: int = 9, m: int = 9, g: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, n, 8), torch.randn(2, g, m, 8), torch.randn(2, g, m, 8)


@twins
def test_signature_is_torchs(name: str) -> None:
    positional = {
        p.name: p.default
        for p in inspect.signature(TWINS[name]).parameters.values()
        if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    }
    assert positional == SIGNATURE
    assert list(positional) == list(SIGNATURE)
    document = F.scaled_dot_product_attention.__doc__ or ""
    told = re.findall(r"\w+", document[document.index("(") : document.index("->")])
    assert [word for word in told if word in SIGNATURE] == list(SIGNATURE), "PyTorch's own signature has changed"
    extra = [p for p in inspect.signature(TWINS[name]).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert [p.name for p in extra] == (["form", "detach_extrema"] if name == "self_adjust" else [])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_softmax_equals_torch(kind: str, is_causal: bool) -> None:
    q, k, v = qkv()
    mask = {"none": None, "bool": torch.rand(2, 1, 9, 9) < 0.8, "float": torch.randn(4, 9, 9)}[kind]
    if kind == "bool":
        mask[..., 0] = True
    told = mask
    if is_causal and mask is not None:
        tril = torch.ones(9, 9, dtype=torch.bool).tril()
        told = mask & tril if kind == "bool" else mask.masked_fill(~tril, -math.inf)
    theirs = F.scaled_dot_product_attention(
        q, k, v, told, is_causal=is_causal and mask is None, enable_gqa=True, scale=0.3
    )
    ours = C.softmax_attention(q, k, v, mask, is_causal=is_causal, scale=0.3, enable_gqa=True)
    assert torch.allclose(ours, theirs, atol=1e-6)


@twins
def test_twins_are_attend(name: str) -> None:
    q, k, v = qkv()
    mask = torch.rand(2, 4, 9, 9) < 0.7
    expected = attend(q, k, v, name, mask=Mask.causal() & Mask.dense(mask), scale=0.5).out
    assert torch.equal(TWINS[name](q, k, v, mask, is_causal=True, scale=0.5), expected)


def test_forms_reach_self_adjust() -> None:
    q, k, v = qkv()
    for form in SelfAdjust.FORMS:
        for detach in (False, True):
            spec = f"self_adjust:form={form},detach_extrema={str(detach).lower()}"
            ours = C.self_adjust_attention(q, k, v, form=form, detach_extrema=detach)
            assert torch.equal(ours, attend(q, k, v, spec).out)
    with pytest.raises(ValueError, match="did you mean 'range'"):
        C.self_adjust_attention(q, k, v, form="rnage")


@twins
def test_causal_is_bottom_right(name: str) -> None:
    """The last query sees every key, so a lone decode query sees all of its past; torch's is top-left."""
    q, k, v = qkv(9, 9)
    full = TWINS[name](q, k, v, is_causal=True)
    for last in (1, 4):
        assert torch.allclose(TWINS[name](q[:, :, -last:], k, v, is_causal=True), full[:, :, -last:], atol=1e-6)
    torchs = F.scaled_dot_product_attention(q[:, :, -1:], k, v, is_causal=True, enable_gqa=True)
    assert torch.allclose(torchs, v[:, :, :1].repeat_interleave(2, 1)), "torch's lone query sees key 0 only"


@twins
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_smallest_number_is_invisible(name: str, dtype: torch.dtype) -> None:
    """Hugging Face sends finfo.min: it decides empty rows and extrema as a bool mask does, whatever is added to it."""
    q, k, v = (x.to(dtype) for x in qkv())
    seen = torch.rand(2, 1, 9, 9) < 0.6
    seen[0, 0, 3] = False
    by_bool = TWINS[name](q, k, v, seen)
    low = torch.finfo(dtype).min
    for hidden in (low, low / 2, -math.inf):
        told = torch.zeros(2, 1, 9, 9, dtype=dtype).masked_fill(~seen, hidden)
        assert torch.allclose(TWINS[name](q, k, v, told), by_bool, atol=2e-2 if dtype != torch.float32 else 1e-6)
        assert (TWINS[name](q, k, v, told)[0, :, 3] == 0.0).all()
    almost = torch.zeros(2, 1, 9, 9, dtype=dtype).masked_fill(~seen, low / 4)
    if name == "self_adjust":
        assert not torch.allclose(TWINS[name](q, k, v, almost).float(), by_bool.float(), atol=2e-2)


@twins
def test_float_masks_carry_gradients(name: str) -> None:
    q, k, v = (x.double() for x in qkv(4, 5))
    seen = torch.rand(2, 1, 4, 5) < 0.7
    seen[..., :3] = True
    values = torch.randn(2, 1, 4, 5, dtype=torch.float64, requires_grad=True)

    def call(x: Tensor) -> Tensor:
        return TWINS[name](q, k, v, x.masked_fill(~seen, -math.inf))

    assert torch.autograd.gradcheck(call, (values,), fast_mode=True)
    (gradient,) = torch.autograd.grad(call(values).sum(), values)
    assert (gradient[~seen] == 0.0).all()


@twins
@pytest.mark.parametrize("shape", [(9,), (9, 9), (4, 1, 9), (2, 1, 1, 9), (1, 4, 9, 1)])
def test_masks_broadcast(name: str, shape: tuple[int, ...]) -> None:
    q, k, v = qkv()
    mask = torch.rand(shape) < 0.7
    wide = mask.expand(2, 4, 9, 9)
    assert torch.allclose(TWINS[name](q, k, v, mask), TWINS[name](q, k, v, wide), atol=1e-6)


@twins
def test_what_is_wrong_is_said(name: str) -> None:
    q, k, v = qkv()
    twin = TWINS[name]
    for arguments, error, said in (
        ((q, k, v, torch.ones(9, 9, dtype=torch.int64)), TypeError, "attn_mask: expected bool"),
        ((q, k, v, torch.ones(1, 1, 1, 9, 9)), ValueError, "at most 4 dimensions"),
        ((q, k, v, torch.ones(9, 8)), ValueError, "does not broadcast"),
        ((q, k, v, torch.ones(9, 8, dtype=torch.bool)), ValueError, "does not broadcast"),
        ((q[0], k, v), ValueError, r"query: expected \[batch, heads, length, head dim\]"),
        ((q.long(), k, v), TypeError, "floating point"),
        (("q", k, v), TypeError, "expected a tensor, got str"),
        ((q, k, v.double()), TypeError, "must share a dtype"),
        ((q, k[:, :, :5], v), ValueError, "agree in heads and length"),
        ((q, k[..., :4], v), ValueError, "agree in head dim"),
        ((q[:1], k, v), ValueError, "batch sizes differ"),
        ((q[:, :3], k, v), ValueError, "multiple of the key/value heads: 3 and 2"),
        ((q, k, v, None, 1.5), ValueError, "probability"),
    ):
        with pytest.raises(error, match=said):
            twin(*arguments)  # type: ignore[arg-type]


def test_dropout() -> None:
    q, k, v = qkv()
    assert not torch.equal(C.softmax_attention(q, k, v, dropout_p=0.5), C.softmax_attention(q, k, v))
    assert not torch.equal(C.self_adjust_attention(q, k, v, dropout_p=0.5), C.self_adjust_attention(q, k, v))
    with pytest.raises(ValueError, match="laser refuses attention dropout"):
        C.laser_attention(q, k, v, dropout_p=0.5)
