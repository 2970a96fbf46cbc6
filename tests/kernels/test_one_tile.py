"""Few queries without a gradient, as decoding has them: one tile, and no more keys than a window shows."""

from __future__ import annotations

import pytest
import torch

from clearhead.attention.attend import attend, make_call
from clearhead.attention.bias import ALiBi
from clearhead.attention.explain import explain
from clearhead.attention.mask import Mask
from clearhead.kernels import one_tile
from clearhead.memory.cache import KVCache

SPECS = [
    "self_adjust",
    "self_adjust:form=minmax",
    "self_adjust:form=product",
    "self_adjust+window:20",
    "softmax",
    "laser",
]
MASKS = {
    "causal": Mask.causal(),
    "everything": Mask(),
    "padded": Mask.causal() & Mask.key_lengths(torch.tensor([50, 37])),
    "documents": None,
}


def tensors(n, m=50, heads=4, groups=2, dtype=torch.float64):
    torch.manual_seed(n)
    return [torch.randn(2, h, length, 16, dtype=dtype) for h, length in ((heads, n), (groups, m), (groups, m))]


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("spec", SPECS)
def test_equals_the_reference(spec, kind, n):
    q, k, v = tensors(n)
    mask = MASKS[kind]
    if kind == "documents":
        mask = Mask.causal() & Mask.segments(
            torch.arange(50 - n, 50).expand(2, n) // 13, torch.arange(50).expand(2, 50) // 13
        )
    call = make_call(q, k, v, spec, mask=mask)
    assert one_tile.fits(call)
    got = attend(q, k, v, spec, mask=mask, backend="chunked").out
    want = attend(q, k, v, spec, mask=mask, backend="reference").out
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_a_bias_and_in_other_precisions(dtype):
    q, k, v = tensors(3, dtype=dtype)
    bias = ALiBi(ALiBi.default_slopes(4))
    got = attend(q, k, v, "self_adjust", mask=Mask.causal(), bias=bias, backend="chunked").out
    want = attend(*(t.double() for t in (q, k, v)), "self_adjust", mask=Mask.causal(), bias=bias, backend="reference")
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want.out, rtol=0, atol=1e-5 if dtype == torch.float32 else 2e-2)


def test_serves_only_what_it_can():
    q, k, v = tensors(1)
    fits = lambda *qkv, **options: one_tile.fits(make_call(*qkv, "self_adjust", mask=Mask.causal(), **options))
    assert fits(q, k, v)
    assert not fits(q, k.requires_grad_(), v)
    with torch.no_grad():
        assert fits(q, k, v)
    assert not fits(q.detach(), k.detach(), v, dropout_p=0.1)
    assert not fits(*tensors(one_tile.FEW + 1))
    assert not one_tile.fits(make_call(*tensors(1), "self_adjust+bigbird:block_size=8", mask=Mask.causal()))


def test_explain_says_so():
    told = str(explain("self_adjust", tensors(1), mask=Mask.causal()))
    assert "one tile" in told
    assert "one tile" not in str(explain("self_adjust", tensors(40), mask=Mask.causal()))


@pytest.mark.parametrize("spec", ["softmax+window:8", "laser+window:8", "self_adjust+window:8"])
def test_a_window_reads_no_key_before_it(spec):
    q, k, v = tensors(50)
    q = q[:, :, -1:]
    want = attend(q, k, v, spec, mask=Mask.causal()).out
    for t in (k, v):
        t[:, :, :42] = float("nan")
    assert torch.equal(attend(q, k, v, spec, mask=Mask.causal()).out, want)


@pytest.mark.parametrize("spec", ["softmax+window:8", "laser+window:8", "self_adjust+window:8", "self_adjust"])
def test_decoding_equals_the_whole(spec):
    q, k, v = tensors(50)
    whole = attend(q, k, v, spec, mask=Mask.causal(), backend="reference").out
    cache = KVCache.allocate(2, 2, 60, 16, dtype=torch.float64)
    steps = []
    for first, last in ((0, 30), (30, 31), (31, 36), *((i, i + 1) for i in range(36, 50))):
        part = [t[:, :, first:last] for t in (q, k, v)]
        steps.append(attend(*part, spec, mask=Mask.causal(), state=cache).out)
    torch.testing.assert_close(torch.cat(steps, dim=2), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("spec", ["softmax", "laser", "self_adjust"])
@pytest.mark.parametrize("offset", [None, torch.zeros(0, dtype=torch.int64)])
def test_no_batch_rows_give_no_output(spec, offset):
    q, k, v = (t[:0] for t in tensors(1))
    ends = torch.zeros(0, dtype=torch.int64)
    for mask in (
        Mask.key_lengths(ends),
        Mask.key_range(ends, None),
        Mask.causal(offset),
        Mask.window(8, offset=offset),
    ):
        out = attend(q, k, v, spec, mask=mask, backend="chunked").out
        assert out.shape == q.shape
