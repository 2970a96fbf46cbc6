"""Biases: values and hand-written gradients by block equal the whole, and what does not fit is said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.bias import BIASES, ALiBi, Bias, DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.terms import Rows

SHAPES = [(2, 4, 7, 9), (1, 4, 7, 9), (2, 1, 7, 9), (1, 4, 1, 9), (2, 1, 7, 1), (1, 1, 1, 1)]


def test_default_slopes() -> None:
    """Press et al.: 2^-1 .. 2^-8 for 8 heads; for other counts every second one of the next power."""
    assert ALiBi.default_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    assert ALiBi.default_slopes(3).tolist() == [2.0**-4, 2.0**-8, 2.0**-2]
    for heads in range(1, 20):
        slopes = ALiBi.default_slopes(heads)
        assert slopes.shape == (heads,)
        assert len(set(slopes.tolist())) == heads
        assert 0.0 < float(slopes.min()) <= float(slopes.max()) < 1.0


def test_alibi_is_minus_slope_times_distance() -> None:
    block = ALiBi(torch.tensor([1.0, 0.25])).block(Rows(torch.arange(2), torch.arange(4), 1))
    assert block[0, 0].tolist() == [[-1.0, 0.0, -1.0, -2.0], [-2.0, -1.0, 0.0, -1.0]]
    assert torch.equal(block[0, 1], block[0, 0] / 4)
    ragged = ALiBi(torch.tensor([1.0])).block(Rows(torch.arange(1), torch.arange(3), torch.tensor([0, 2])))
    assert ragged[:, 0, 0].tolist() == [[0.0, -1.0, -2.0], [-2.0, -1.0, 0.0]]


@pytest.mark.parametrize("make", [lambda: ALiBi(torch.rand(4, requires_grad=True))]
                         + [lambda s=s: DenseBias(torch.randn(s, requires_grad=True)) for s in SHAPES])  # fmt: skip
def test_blocks_equal_the_whole(make) -> None:  # type: ignore[no-untyped-def]
    """Values and gradients in odd blocks of rows, columns, batch rows and heads; only the sum's order differs."""
    b, h, n, m = 2, 4, 7, 9
    bias: Bias = make()
    bias.check(b, h, n, m)
    every = Rows(torch.arange(n), torch.arange(m), 2)
    whole = bias.block(every).expand(b, h, n, m)
    weight = torch.randn(b, h, n, m)
    (expected,) = torch.autograd.grad(whole, bias.tensors(), weight)
    gradients = [torch.zeros_like(t) for t in bias.tensors()]
    for batch, heads, row, key in _blocks(b, h, n, m):
        part = type(bias).decode(bias.narrow(bias.tensors(), batch, heads))
        rows = Rows(torch.arange(n)[row], torch.arange(m)[key], 2)
        block = part.block(rows).expand(batch.stop - batch.start, heads.stop - heads.start, -1, -1)
        assert torch.equal(block.expand_as(weight[batch, heads, row, key]), whole[batch, heads, row, key])
        with torch.no_grad():
            part.accumulate(bias.narrow(gradients, batch, heads), rows, weight[batch, heads, row, key])
    assert torch.allclose(gradients[0], expected, atol=1e-5)


def _blocks(b: int, h: int, n: int, m: int) -> list[tuple[slice, slice, slice, slice]]:
    def cut(size: int, step: int) -> list[slice]:
        return [slice(i, min(i + step, size)) for i in range(0, size, step)]

    return [(x, y, z, w) for x in cut(b, 1) for y in cut(h, 3) for z in cut(n, 2) for w in cut(m, 4)]


def test_encode_and_decode() -> None:
    for bias in (ALiBi(torch.rand(3)), DenseBias(torch.randn(1, 2, 3, 4))):
        again = BIASES[bias.code].decode(bias.tensors())
        assert type(again) is type(bias)
        assert torch.equal(again.tensors()[0], bias.tensors()[0])
    assert not ALiBi(torch.rand(3)).requires_grad
    assert ALiBi(torch.rand(3, requires_grad=True)).requires_grad


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "reference"])
def test_dense_bias_of_numbers_is_a_shift_of_scores(backend: str) -> None:
    """A bias of log c multiplies a key's weight by c."""
    q, k, v = torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 3, 4), torch.tensor([1.0, 10.0, 100.0]).view(1, 1, 3, 1)
    bias = DenseBias(torch.tensor([1.0, 2.0, 5.0]).log().view(1, 1, 1, 3))
    out = attend(q, k, v, bias=bias, backend=backend).out
    assert out.item() == pytest.approx((1 + 20 + 500) / 8)


@pytest.mark.parametrize("backend", ["sdpa", "chunked", "reference"])
def test_low_precision_keeps_alibi_distances(backend: str) -> None:
    """Scores of a bf16 model with fp32 slopes: a distance of 1000 may not be rounded to bf16's 2^-8."""
    n = 1025
    q, k = torch.zeros(1, 1, 1, 8, dtype=torch.bfloat16), torch.zeros(1, 1, n, 8, dtype=torch.bfloat16)
    v = torch.zeros(1, 1, n, 1, dtype=torch.bfloat16)
    v[0, 0, 0] = 1.0
    mask = Mask.dense((torch.arange(n) < 2)[None, None, None])  # two keys, at distances 1024 and 1023
    out = attend(q, k, v, mask=mask, bias=ALiBi(torch.tensor([0.5])), backend=backend).out
    assert out.item() == pytest.approx(1.0 / (1.0 + 2.718281828**0.5), rel=1e-2)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: DenseBias(torch.ones(1, 1, 2, 2, dtype=torch.bool)), TypeError, "visibility belongs in a Mask"),
        (lambda: DenseBias(torch.ones(2, 2)), ValueError, "expected 4 dimensions"),
        (lambda: DenseBias(torch.ones(1, 3, 2, 2)).check(1, 2, 2, 2), ValueError, "does not broadcast to"),
        (lambda: ALiBi(torch.ones(3)).check(1, 2, 2, 2), ValueError, "one slope for each of 2 heads"),
    ],
)
def test_errors(make, error: type[Exception], said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=said):
        make()


def test_gradient_of_slopes_under_grouped_queries() -> None:
    """ALiBi counts query heads, not key heads; the gradient is -sum of d score times distance."""
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 5, 3).double(), torch.randn(1, 2, 5, 3).double(), torch.randn(1, 2, 5, 3).double()

    def out(slopes: Tensor, backend: str) -> Tensor:
        return attend(q, k, v, mask=Mask.causal(), bias=ALiBi(slopes), backend=backend).out

    slopes = torch.rand(4, dtype=torch.float64, requires_grad=True)
    for backend in ("chunked", "reference"):
        assert torch.autograd.gradcheck(lambda s, name=backend: out(s, name), (slopes,))
