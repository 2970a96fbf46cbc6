"""T5's relative positions: buckets, values by block, gradients by tile, decoding, padding, compilation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.bias import read_bias
from clearhead.attention.mask import Mask
from clearhead.attention.t5 import T5Bias, bucket_starts, relative_bucket
from clearhead.attention.terms import Rows
from clearhead.memory.cache import KVCache

BOTH = pytest.mark.parametrize("bidirectional", [False, True], ids=["causal", "bidirectional"])


def bucket_by_formula(distance: int, buckets: int, max_distance: int, bidirectional: bool) -> int:
    """The released T5's rule, with a nudge where a logarithm's rounding could fall below a whole number."""
    base = 0
    if bidirectional:
        buckets //= 2
        base = buckets if distance > 0 else 0
        far = abs(distance)
    else:
        far = max(-distance, 0)
    exact = buckets // 2
    if far < exact:
        return base + far
    share = math.log(far / exact) / math.log(max_distance / exact)
    return base + min(exact + int(share * (buckets - exact) + 1e-9), buckets - 1)


@BOTH
@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (8, 20), (6, 9), (64, 300)])
def test_buckets_follow_the_formula(bidirectional: bool, buckets: int, max_distance: int) -> None:
    distance = torch.arange(-400, 401)
    found = relative_bucket(distance, buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    expected = [bucket_by_formula(d, buckets, max_distance, bidirectional) for d in distance.tolist()]
    assert found.tolist() == expected
    assert found.max() == buckets - 1
    if not bidirectional:
        assert (found[distance >= 0] == 0).all()


def test_the_published_edges() -> None:
    """32 buckets to distance 128: for each direction 0..7 exact, then these first distances."""
    assert bucket_starts(16, 128)[7:] == (8, 12, 16, 23, 32, 46, 64, 91)


@BOTH
@pytest.mark.parametrize("offset", [0, 5, torch.tensor([2, 7])], ids=["0", "5", "a row each"])
def test_blocks_and_their_gradients_equal_the_whole(bidirectional: bool, offset: int | Tensor) -> None:
    b, h, n, m = 2, 3, 7, 11
    table = torch.randn(h, 8, dtype=torch.float64, requires_grad=True)
    bias = T5Bias(table, 20, bidirectional)
    queries = torch.arange(n)[None] + (offset[:, None] if isinstance(offset, Tensor) else offset)
    distance = torch.arange(m) - queries[..., None]
    buckets = relative_bucket(distance, buckets=8, max_distance=20, bidirectional=bidirectional)
    whole = table[:, buckets].transpose(0, 1).expand(b, h, n, m)
    weight = torch.randn(b, h, n, m, dtype=torch.float64)
    (expected,) = torch.autograd.grad(whole, table, weight)

    gradients = [torch.zeros_like(table)]
    for heads in (slice(0, 2), slice(2, 3)):
        part = bias.with_tensors(bias.narrow(bias.tensors(), slice(0, b), heads))
        for row in (slice(0, 3), slice(3, 7)):
            for key in (slice(0, 1), slice(1, 11)):
                rows = Rows(torch.arange(n)[row], torch.arange(m)[key], offset)
                block = part.block(rows).expand(b, heads.stop - heads.start, -1, -1)
                assert torch.equal(block, whole[:, heads, row, key])
                with torch.no_grad():
                    part.accumulate(bias.narrow(gradients, slice(0, b), heads), rows, weight[:, heads, row, key])
    torch.testing.assert_close(gradients[0], expected)


@BOTH
@pytest.mark.parametrize("spec", ["softmax", "laser", "self_adjust", "softmax+window:9"])
def test_tiles_give_the_gradient_of_dense_autograd(bidirectional: bool, spec: str) -> None:
    """More rows than a tile has, grouped queries, padding and causality: output and every gradient."""
    q = torch.randn(2, 4, 90, 8, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(2, 2, 90, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    table = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    mask = Mask.key_range(torch.tensor([0, 13]), torch.tensor([90, 80]))
    mask = mask if bidirectional else mask & Mask.causal()
    weight = torch.randn(2, 4, 90, 8, dtype=torch.float64)
    results = []
    for backend in ("chunked", "reference"):
        out = attend(q, k, v, spec, mask=mask, bias=T5Bias(table, 20, bidirectional), backend=backend).out
        results.append([out, *torch.autograd.grad((out * weight).sum(), (q, k, v, table))])
    for ours, dense in zip(*results):
        torch.testing.assert_close(ours, dense, rtol=1e-9, atol=1e-9)


def test_a_table_that_needs_a_gradient_never_meets_a_dense_mask() -> None:
    from clearhead.attention.explain import explain

    q = torch.zeros(1, 2, 40, 8)
    table = torch.zeros(2, 8, requires_grad=True)
    call = {"bias": T5Bias(table, 20), "mask": Mask.causal()}
    chosen = next(v for v in explain("softmax", (q, q, q), **call).verdicts if v.verdict == "chosen")
    assert chosen.backend == "chunked"


@torch.no_grad()
def test_cached_decoding_equals_the_full_pass() -> None:
    q, k, v = (torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(3))
    bias = T5Bias(torch.randn(3, 6, dtype=torch.float64), 9)
    full = attend(q, k, v, mask=Mask.causal(), bias=bias).out
    for cuts in ([1] * 40, [17, 1, 9, 13]):
        cache = KVCache.allocate(2, 3, 40, 8, dtype=torch.float64)
        parts = [
            attend(*part, mask=Mask.causal(), bias=bias, state=cache).out
            for part in zip(*(t.split(cuts, dim=2) for t in (q, k, v)))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=2), full)


@BOTH
@pytest.mark.parametrize("train", [True, False])
def test_compiles_whole(bidirectional: bool, train: bool) -> None:
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 20, 8) for _ in range(3))
    table = torch.randn(2, 8, requires_grad=train)

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        mask = Mask() if bidirectional else Mask.causal()
        return attend(q, k, v, mask=mask, bias=T5Bias(table, 20, bidirectional)).out

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(q, k, v, table), run(q, k, v, table)
    torch.testing.assert_close(ours, eager)
    if train:
        gradients = [torch.autograd.grad(out.square().sum(), table)[0] for out in (ours, eager)]
        torch.testing.assert_close(*gradients)


def test_text_and_tensors_make_the_bias_again() -> None:
    bias = T5Bias(torch.randn(2, 8), 20, True)
    again = read_bias(bias.text, bias.tensors())
    assert isinstance(again, T5Bias)
    assert (again.max_distance, again.bidirectional) == (20, True)
    assert again.table is bias.table


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: T5Bias(torch.zeros(2, 7), 20, True), "an even number"),
        (lambda: T5Bias(torch.zeros(2, 1)), "at least 2 buckets"),
        (lambda: T5Bias(torch.zeros(8)), "expected a table"),
        (lambda: T5Bias(torch.zeros(2, 32), 16), "max_distance must lie above the 16 exact buckets"),
        (lambda: T5Bias(torch.zeros(3, 8)).check(1, 2, 4, 4), "a row for each of 2 heads"),
    ],
)
def test_errors(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        make()
