"""Kerple and FIRE: values and gradients by block equal the papers' formulas written out; documents; memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.bias import ALiBi, Bias, DenseBias, read_bias
from clearhead.attention.explain import explain
from clearhead.attention.fire import FireBias
from clearhead.attention.kerple import KerpleBias
from clearhead.attention.mask import Mask
from clearhead.attention.t5 import T5Bias
from clearhead.attention.terms import Rows
from clearhead.layers.position.fire import FirePosition
from clearhead.layers.position.kerple import KerplePosition
from clearhead.memory.cache import KVCache
from tests.attention.test_linear_length import BACKWARD, FORWARD, Largest, opened

H, UNITS = 3, 5
KINDS = pytest.mark.parametrize("kind", ["log", "power", "fire"])


def leaf(*shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    return torch.empty(*shape, dtype=torch.float64).uniform_(low, high).requires_grad_()


def learned(kind: str, heads: int = H) -> Bias:
    if kind == "t5":
        return T5Bias(leaf(heads, 8), 20)
    if kind != "fire":
        return KerpleBias(leaf(heads, low=0.2), leaf(heads, low=0.2), kind)
    threshold = torch.tensor([6.5], dtype=torch.float64, requires_grad=True)
    return FireBias(
        leaf(UNITS), leaf(UNITS), leaf(heads, UNITS), leaf(heads), leaf(1, low=0.1), threshold
    )  # fmt: skip


def written_out(bias: Bias, far_bnm: Tensor, place_bn: Tensor) -> Tensor:
    """[b, h, n, m] from |q - k| and the query's place in its document, as the papers print it."""
    far = far_bnm[:, None].to(bias.tensors()[0].dtype)
    if isinstance(bias, KerpleBias):
        r1, r2 = (t.view(1, -1, 1, 1) for t in bias.tensors())
        return -r1 * (1.0 + r2 * far).log() if bias.form == "log" else -r1 * far**r2
    assert isinstance(bias, FireBias)
    longest = torch.maximum(bias.threshold, place_bn.to(far.dtype))[:, None, :, None]
    x = (bias.rate * far + 1.0).log() / (bias.rate * longest + 1.0).log()
    hidden = torch.relu(x[..., None] * bias.weight + bias.level)  # [b, 1, n, m, u]
    return (hidden @ bias.out.T + bias.base)[:, 0].permute(0, 3, 1, 2)


@KINDS
@pytest.mark.parametrize("listed", [False, True], ids=["runs", "listed"])
@pytest.mark.parametrize("offset", [0, 5, torch.tensor([2, 7])], ids=["0", "5", "a row each"])
def test_blocks_and_their_gradients_equal_the_formula(kind: str, offset: int | Tensor, listed: bool) -> None:
    """In odd blocks of rows, columns and heads; FIRE with a document of its own per batch row."""
    torch.manual_seed(3)
    b, n, m = 2, 7, 13
    bias = learned(kind)
    start = torch.tensor([[0], [3]])
    if isinstance(bias, FireBias):
        bias = bias.within(Mask.key_range(start[:, 0], None).terms)
    position = (torch.arange(n)[None] + (offset[:, None] if isinstance(offset, Tensor) else offset)).expand(b, n)
    whole = written_out(bias, (position[..., None] - torch.arange(m)).abs(), (position - start).clamp_min(0))
    whole = whole.expand(b, H, n, m)
    weight = torch.randn(b, H, n, m, dtype=torch.float64)
    parameters = [t for t in bias.tensors() if t.requires_grad]
    expected = torch.autograd.grad(whole, parameters, weight)

    gradients = [torch.zeros_like(t) for t in bias.tensors()]
    keys = (slice(0, 13, 3), slice(1, 13, 3), slice(2, 13, 3)) if listed else (slice(0, 1), slice(1, 13))
    for heads in (slice(0, 2), slice(2, 3)):
        part = bias.with_tensors(bias.narrow(bias.tensors(), slice(0, b), heads))
        for row in (slice(0, 3), slice(3, 7)):
            for key in keys:
                rows = Rows(torch.arange(n)[row], torch.arange(m)[key], offset, listed)
                block = part.block(rows).expand(b, heads.stop - heads.start, -1, -1)
                torch.testing.assert_close(block, whole[:, heads, row, key], rtol=1e-12, atol=1e-12)
                with torch.no_grad():
                    part.accumulate(bias.narrow(gradients, slice(0, b), heads), rows, weight[:, heads, row, key])
    for mine, true in zip(gradients, expected, strict=False):
        assert true.abs().max() > 0
        torch.testing.assert_close(mine, true, rtol=1e-10, atol=1e-10)


@KINDS
@pytest.mark.parametrize("spec", ["softmax", "laser", "self_adjust", "softmax+window:9", "laser+bigbird:block_size=8"])
def test_tiles_give_every_gradient_of_dense_attention(kind: str, spec: str) -> None:
    """More rows than a tile has, grouped queries, padding: against the bias as a dense tensor of the formula."""
    torch.manual_seed(1)
    n = 91
    q, k, v = leaf(2, 4, n, 8, high=2.0), leaf(2, 2, n, 8, high=2.0), leaf(2, 2, n, 8)
    bias, weight = learned(kind, 4), torch.randn(2, 4, n, 8, dtype=torch.float64)
    starts = torch.tensor([0, 13])
    mask = Mask.key_range(starts, torch.tensor([n, 80])) & Mask.causal()
    far = (torch.arange(n)[:, None] - torch.arange(n)).abs()[None]
    leaves = (q, k, v, *bias.tensors())
    results = []
    for backend in ("chunked", "reference"):
        out = attend(q, k, v, spec, mask=mask, bias=bias, backend=backend).out
        results.append([out, *torch.autograd.grad((out * weight).sum(), leaves)])
    dense = DenseBias(written_out(bias, far, (torch.arange(n)[None] - starts[:, None]).clamp_min(0)))
    out = attend(q, k, v, spec, mask=mask, bias=dense, backend="reference").out
    true = [out, *torch.autograd.grad((out * weight).sum(), leaves)]
    for ours in results:
        for mine, expected in zip(ours, true, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-9)


@KINDS
@pytest.mark.parametrize("form", ["softmax", "self_adjust", "laser"])
def test_gradcheck(kind: str, form: str) -> None:
    torch.manual_seed(2)
    bias = learned(kind, 2)
    q, k, v = leaf(1, 2, 9, 3, high=2.0), leaf(1, 2, 11, 3, high=2.0), leaf(1, 2, 11, 2)

    def run(q: Tensor, k: Tensor, v: Tensor, *tensors: Tensor) -> Tensor:
        return attend(q, k, v, form, mask=Mask.causal(), bias=bias.with_tensors(list(tensors)), backend="chunked").out

    assert torch.autograd.gradcheck(run, (q, k, v, *bias.tensors()))


@torch.no_grad()
def test_units_that_do_not_bend_and_bends_that_coincide() -> None:
    """A hidden unit of weight 0 is a constant; two units may bend at one place, and one beyond every distance."""
    weight = torch.tensor([0.0, 0.0, 1.0, -2.0, 1.0, 3.0])
    level = torch.tensor([0.7, -0.7, -0.5, 1.0, -0.5, -90.0])
    bias = FireBias(weight, level, torch.randn(H, 6), torch.randn(H), torch.tensor([0.3]), torch.tensor([4.0]))
    n = 12
    far = (torch.arange(n)[:, None] - torch.arange(n)).abs()[None]
    block = bias.block(Rows(torch.arange(n), torch.arange(n), 0))
    torch.testing.assert_close(block, written_out(bias, far, torch.arange(n)[None]))


@torch.no_grad()
def test_a_power_of_1_is_alibi() -> None:
    slopes, rows = torch.rand(H), Rows(torch.arange(5), torch.arange(9), 3)
    torch.testing.assert_close(
        KerpleBias(slopes, torch.ones(H), "power").block(rows), ALiBi(slopes).block(rows).float()
    )


@torch.no_grad()
def test_fire_depends_on_the_distance_alone_up_to_its_threshold_and_is_stretched_beyond() -> None:
    bias = learned("fire")
    near = bias.block(Rows(torch.arange(7), torch.arange(7), 0))  # places 0 .. 6, threshold 6.5
    assert torch.equal(near[..., 6, 3], near[..., 3, 0])
    far = bias.block(Rows(torch.arange(40), torch.arange(40), 0))
    assert not torch.allclose(far[..., 39, 36], far[..., 3, 0])
    # The first key of a document is at x = 1 from everywhere beyond the threshold.
    torch.testing.assert_close(far[..., 39, 0], far[..., 20, 0])


@torch.no_grad()
def test_packed_documents_equal_separate_ones() -> None:
    """Each document is stretched to its own length; a document before it, or padding, makes no difference."""
    q, k, v = (torch.randn(1, H, 60, 8, dtype=torch.float64) for _ in range(3))
    segments = torch.tensor([[4] * 17 + [1] * 23 + [-1] * 3 + [2] * 17])
    bias = learned("fire")
    for backend in ("chunked", "reference", "sdpa"):
        fixed = bias.with_tensors([t.detach() for t in bias.tensors()])
        packed = attend(q, k, v, mask=Mask.causal() & Mask.segments(segments), bias=fixed, backend=backend).out
        for first, end in ((0, 17), (17, 40), (43, 60)):
            alone = [x[:, :, first:end] for x in (q, k, v)]
            out = attend(*alone, mask=Mask.causal(), bias=fixed, backend=backend).out
            torch.testing.assert_close(packed[:, :, first:end], out, rtol=1e-10, atol=1e-10)


@KINDS
@torch.no_grad()
def test_cached_decoding_equals_the_full_pass(kind: str) -> None:
    q, k, v = (torch.randn(2, H, 40, 8, dtype=torch.float64) for _ in range(3))
    bias = learned(kind)
    full = attend(q, k, v, mask=Mask.causal(), bias=bias).out
    for cuts in ([1] * 40, [17, 1, 9, 13]):
        cache = KVCache.allocate(2, H, 40, 8, dtype=torch.float64)
        parts = [
            attend(*part, mask=Mask.causal(), bias=bias, state=cache).out
            for part in zip(*(t.split(cuts, dim=2) for t in (q, k, v)))
        ]
        torch.testing.assert_close(torch.cat(parts, dim=2), full)


@pytest.mark.parametrize(
    ("kind", "spec"),
    [*((kind, "softmax") for kind in ("t5", "log", "power", "fire")), ("fire", "laser"), ("fire", "self_adjust")],
)
def test_no_tensor_grows_faster_than_length(kind: str, spec: str) -> None:
    """Forward and backward: every tensor that is made inside the operators is counted."""

    def largest(n: int) -> tuple[int, int]:
        torch.manual_seed(0)
        q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for _ in range(3))
        bias = learned(kind, 1)
        bias = bias.with_tensors([t.detach().float().requires_grad_() for t in bias.tensors()])
        with torch.no_grad(), opened(*FORWARD), Largest() as forward:
            attend(q, k, v, spec, mask=Mask.causal(), bias=bias, backend="chunked")
        out = attend(q, k, v, spec, mask=Mask.causal(), bias=bias, backend="chunked").out
        with opened(*BACKWARD), Largest() as backward:
            out.sum().backward()
        assert all(t.grad is not None for t in bias.tensors())
        return forward.elements, backward.elements

    for short, long in zip(largest(1024), largest(2048), strict=True):
        assert long <= 2 * short
        assert long < 2048**2 / 8


@KINDS
def test_the_fused_kernel_serves_what_needs_no_gradient_and_says_why_it_refuses_the_rest(kind: str) -> None:
    q = torch.zeros(1, H, 40, 8)
    for train in (True, False):
        bias = learned(kind)
        bias = bias.with_tensors([t.detach().float().requires_grad_(train) for t in bias.tensors()])
        told = explain("softmax", (q, q, q), bias=bias, mask=Mask.causal())
        assert told.chosen == ("chunked" if train else "sdpa")
        assert ("slow path" in told.verdicts[0].reason) == train


def test_text_and_tensors_make_the_bias_again() -> None:
    for kind in ("log", "power", "fire"):
        bias = learned(kind).within(Mask.key_range(torch.tensor([2]), None).terms)
        again = read_bias(bias.text, bias.tensors())
        assert type(again) is type(bias)
        assert again.text == bias.text
        assert all(x is y for x, y in zip(again.tensors(), bias.tensors(), strict=True))


def test_layers_keep_their_kernels_in_range() -> None:
    """Whatever an optimizer does to the parameters: r1, r2, c and L stay above 0, a power below 2."""
    for low in (-9.0, 9.0):
        for module in (KerplePosition(H, "log"), KerplePosition(H, "power"), FirePosition(H, 4, 32.0)):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(low)
            bias = module()
            positive = bias.tensors() if isinstance(bias, KerpleBias) else bias.tensors()[4:6]
            assert all((t > 0).all() for t in positive)
            if isinstance(bias, KerpleBias) and bias.form == "power":
                assert (bias.rate < 2).all()
    assert FirePosition(H, 4, 32.0)().threshold.item() == pytest.approx(32.0)
    half = KerplePosition(H, "log").to(torch.bfloat16)()
    assert half.rate.dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: KerpleBias(torch.ones(2), torch.ones(3)), "scale and rate"),
        (lambda: KerpleBias(torch.ones(2), torch.ones(2), "gauss"), "log"),
        (lambda: KerpleBias(torch.ones(2), torch.ones(2)).check(1, 3, 4, 4), "each of 3 heads"),
        (lambda: FireBias(*map(torch.ones, (2, 3)), torch.ones(1, 2), *map(torch.ones, (1, 1, 1))), "expected shapes"),
        (lambda: learned("fire").check(1, 2, 4, 4), "each of 2 heads"),
        (lambda: learned("fire").within(Mask.key_range(torch.tensor([1, 2]), None).terms).check(3, H, 4, 4), "starts"),
        (lambda: FirePosition(2, 4, 0.0), "threshold above 0"),
    ],
)
def test_errors(make, said: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=said):
        make()
