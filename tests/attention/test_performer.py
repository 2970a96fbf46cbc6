"""The performer against its theory, and against the defects of public code (arXiv 2009.14794)."""

from __future__ import annotations

import math

import pytest
import torch

from clearhead import functional as F
from clearhead.attention.attend import attend, make_call
from clearhead.attention.bias import ALiBi
from clearhead.attention.explain import explain
from clearhead.attention.mask import Mask
from clearhead.attention.performer import performer_attention
from clearhead.attention.projection import draw_projection, haar, projection_of
from clearhead.attention.selective import Temperatures
from clearhead.attention.spec import AttentionSpec, Performer
from clearhead.errors import UserError
from clearhead.kernels.features import MAPS, make_map

POSITIVE = [k for k in Performer.KERNELS if k != "trigonometric"]


def estimates(kernel, rows, x, y):
    """phi(x).phi(y) for each draw: rows [draws, m, d], x and y [d]."""
    features = make_map(kernel, rows, torch.float64)
    (a, p), (b, q) = (features(t.expand(rows.shape[0], 1, -1)) for t in (x, y))
    return ((a * b).sum(-1) * (p + q).exp()).squeeze(1)


def pair(cosine, d=16, norm=1.0):
    x, y = torch.zeros(d, dtype=torch.float64), torch.zeros(d, dtype=torch.float64)
    x[0], y[0], y[1] = norm, norm * cosine, norm * math.sqrt(1 - cosine**2)
    return x, y


def gaussian_rows(draws, m, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(draws, m, d, generator=generator, dtype=torch.float64)


def orthogonal_rows(draws, d, *, fixed=True, seed=1):
    """One full block a draw, with chi_d norms; `fixed` False = as the factorisation leaves it."""
    g = gaussian_rows(draws, d, d, seed)
    q = haar(g) if fixed else torch.linalg.qr(g)[0]
    return q.mT * gaussian_rows(draws, d, d, seed + 1).norm(dim=-1, keepdim=True)


def exact(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)


# ---- the estimators ----


@pytest.mark.parametrize("cosine", [0.9, 0.0, -0.9])
def test_variances_of_lemma_2(cosine):
    """d = m = 16, 20,000 draws, |x| = |y| = 1. Where x and y point alike the positive estimates have tails so heavy
    that 20,000 draws do not find their variance, and the trigonometric one is far better."""
    x, y = pair(cosine)
    rows = gaussian_rows(20_000, 16, 16)
    sm, z, delta = math.exp(x @ y), (x + y).square().sum().item(), (x - y).square().sum().item()
    positive = math.exp(z) * sm**2 * (1 - math.exp(-z)) / 16
    theory = {
        "softmax": positive,
        "hyperbolic": 0.5 * (1 - math.exp(-z)) * positive,
        "trigonometric": math.exp(z) * sm**-2 * (1 - math.exp(-delta)) ** 2 / 32,
    }
    for kernel, expected in theory.items():
        found = estimates(kernel, rows, x, y)
        mse = (found - sm).square().mean().item()
        if cosine == 0.9 and kernel != "trigonometric":
            assert found.mean().item() == pytest.approx(sm, rel=0.05)
            assert mse > 100 * theory["trigonometric"]
        else:
            assert found.mean().item() == pytest.approx(sm, rel=0.01)
            assert mse == pytest.approx(expected, rel=0.10), kernel


def test_regularized_is_the_kernel_of_its_series():
    """SMREG / SM = e^-w sum_k w^k / k! d^k / (d (d + 2) ... (d + 2k - 2)), w = |x + y|^2 / 2 (eq. 30)."""
    d, norm = 16, 1.0
    x, y = pair(0.5, d, norm)
    rows = gaussian_rows(40_000, d, d)
    rows = rows / rows.norm(dim=-1, keepdim=True) * d**0.5
    w = 0.5 * (x + y).square().sum().item()
    term, total = 1.0, 1.0
    for k in range(1, 40):
        term *= w / k * d / (d + 2 * k - 2)
        total += term
    found = estimates("regularized", rows, x, y).mean().item() / math.exp(x @ y)
    assert found == pytest.approx(math.exp(-w) * total, rel=0.015)
    assert found < 0.97  # not softmax's kernel


def test_orthogonal_blocks_are_better_and_keep_theorem_2():
    x, y = pair(0.0)
    sm = math.exp(x @ y)
    mse = {}
    for name, rows in (("iid", gaussian_rows(20_000, 16, 16)), ("orthogonal", orthogonal_rows(20_000, 16))):
        mse[name] = (estimates("softmax", rows, x, y) - sm).square().mean().item()
    iid = math.exp(2.0) * (1 - math.exp(-2.0)) / 16
    bound = iid - 2 * 15 / (16 * 18) * (sm - math.exp(-1.0)) ** 2
    assert mse["orthogonal"] <= bound < iid
    assert mse["orthogonal"] < 0.85 * mse["iid"]


def test_unbiased_with_haar_blocks_and_biased_without_the_sign():
    """d = 16, z along (1, ..., 1), 20,000 draws: E / truth 0.93, 0.86, 0.79 without the sign."""
    with_sign, without = orthogonal_rows(20_000, 16), orthogonal_rows(20_000, 16, fixed=False)
    for norm, least in ((0.5, 0.95), (1.0, 0.89), (1.5, 0.83)):
        x = torch.full((16,), norm / 4, dtype=torch.float64)
        zero = torch.zeros_like(x)
        assert estimates("softmax", with_sign, x, zero).mean().item() == pytest.approx(1.0, abs=0.012)
        assert estimates("softmax", without, x, zero).mean().item() < least


def test_draws_are_haar_orthogonal_with_chi_norms_and_independent_blocks():
    w = draw_projection(40, 16, seed=0, dtype=torch.float64)
    assert w.shape == (40, 16)
    unit = w / w.norm(dim=-1, keepdim=True)
    for block in unit.split(16):
        torch.testing.assert_close(block @ block.mT, torch.eye(len(block), dtype=torch.float64))
    across = unit[:16] @ unit[16:32].mT
    assert across.abs().max() > 0.1
    norms = torch.cat([draw_projection(64, 16, seed=s).square().sum(-1) for s in range(100)])
    assert norms.mean().item() == pytest.approx(16.0, abs=0.3)  # chi^2 with 16 degrees of freedom
    assert norms.var().item() == pytest.approx(32.0, rel=0.1)
    even = draw_projection(40, 16, seed=0, scaling="sqrt_d")
    torch.testing.assert_close(even.norm(dim=-1), torch.full((40,), 4.0))
    diagonal = torch.stack([haar(gaussian_rows(1, 8, 8, s)[0]).diagonal() for s in range(400)])
    assert diagonal.mean().abs() < 0.02  # the factorisation alone: about -0.28


def test_draws_depend_on_their_seeds_alone():
    choice = Performer(features=24)
    first = projection_of(choice, 8, place=1, draw=2)
    torch.manual_seed(99)
    assert torch.equal(first, projection_of(choice, 8, place=1, draw=2))
    others = [projection_of(Performer(features=24, seed=1), 8, place=1, draw=2), projection_of(choice, 8, draw=2)]
    assert not any(torch.equal(first, other) for other in others)
    a, b = (draw_projection(9, 4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)
    wide = draw_projection(9, 4, seed=5, dtype=torch.float64)
    assert torch.equal(wide.float(), draw_projection(9, 4, seed=5))
    for wrong in (dict(seed=0, scaling="d"), dict(), dict(seed=0, generator=torch.Generator())):
        with pytest.raises(ValueError, match="draw_projection"):
            draw_projection(4, 4, **wrong)


@pytest.mark.parametrize("kernel", MAPS)
def test_feature_maps(kernel):
    """F e^c is the formula, without an epsilon but ReLU's; the analytic gradient is autograd's of the whole."""
    d, m = 5, 7
    w = gaussian_rows(1, m, d)[0]
    x = gaussian_rows(1, 3, d, 7)[0].requires_grad_()
    u, square = x @ w.mT, x.square().sum(-1, keepdim=True) / 2
    plain = {
        "softmax": (u - square).exp() / m**0.5,
        "hyperbolic": torch.cat([(u - square).exp(), (-u - square).exp()], -1) / (2 * m) ** 0.5,
        "trigonometric": torch.cat([u.sin(), u.cos()], -1) * square.exp() / m**0.5,
        "relu": (u.relu() + 1e-3) / m**0.5,
    }
    phi = plain["softmax" if kernel == "regularized" else kernel]
    features = make_map(kernel, w, torch.float64)
    f, c = features(x.detach())
    torch.testing.assert_close(f * c.exp().unsqueeze(-1), phi.detach())
    assert f.shape[-1] == features.width == Performer(kernel, m).width
    d_phi = gaussian_rows(1, *phi.shape, 9)[0]
    (wanted,) = torch.autograd.grad(phi, x, d_phi)
    torch.testing.assert_close(features.gradient(x.detach(), f, d_phi * c.exp().unsqueeze(-1)), wanted)


# ---- the error of the output ----


def output_error(kernel, m, std, draws, *, orthogonal=True, length=512, d=16):
    generator = torch.Generator().manual_seed(11)
    q, k, v = (torch.randn(1, 1, length, d, generator=generator) * s for s in (std, std, 1.0))
    true, total = exact(q, k, v), 0.0
    for draw in range(draws):
        rows = draw_projection(m, d, seed=1000 * m + draw, orthogonal=orthogonal)
        total += (F.performer_attention(q, k, v, kernel=kernel, projection=rows) - true).square().mean().item()
    return total / draws


def slope(kernel, std, draws, sizes=(16, 32, 64, 128, 256, 512), **more):
    y = torch.tensor([0.5 * math.log(output_error(kernel, m, std, draws, **more)) for m in sizes])
    x = torch.tensor(sizes, dtype=torch.float32).log()
    return ((x - x.mean()) * (y - y.mean())).sum().item() / (x - x.mean()).square().sum().item()


def test_error_falls_with_the_root_of_the_features_at_small_norms():
    assert -0.57 <= slope("softmax", 0.25, 12) <= -0.43


@pytest.mark.full
@pytest.mark.parametrize(
    ("kernel", "orthogonal"),
    [("softmax", True), ("softmax", False), ("hyperbolic", True), ("trigonometric", True), ("trigonometric", False)],
)
def test_error_falls_with_the_root_of_the_features(kernel, orthogonal):
    assert -0.55 <= slope(kernel, 0.25, 60, orthogonal=orthogonal) <= -0.45


@pytest.mark.full
def test_features_do_not_help_at_large_norms():
    """q, k ~ N(0, 1) at d = 16: relative variance about e^8 / m. No promise of 1 / sqrt(m) holds there."""
    assert slope("softmax", 1.0, 20) > -0.25


def test_orthogonal_beats_iid_in_the_output():
    assert output_error("softmax", 512, 0.25, 10) < output_error("softmax", 512, 0.25, 10, orthogonal=False)


def test_trigonometric_denominators_reach_zero_and_positive_ones_do_not():
    """At std 1 the signed estimate explodes; at std 0.25 it is the better one."""
    errors = {(kernel, std): output_error(kernel, 16, std, 10) for kernel in ("softmax", "trigonometric")
              for std in (0.25, 1.0)}  # fmt: skip
    assert errors["trigonometric", 1.0] > 30 * errors["softmax", 1.0]
    assert errors["trigonometric", 0.25] < errors["softmax", 0.25]
    q, k, v = (torch.randn(1, 1, 256, 16) for _ in range(3))
    for kernel in Performer.KERNELS:
        w = attend(q, k, v, f"performer:kernel={kernel},features=16", want=["weights"]).extras["weights"]
        torch.testing.assert_close(w.sum(-1), torch.ones_like(w[..., 0]), atol=1e-3, rtol=0)
        assert (w.min() < 0.0) == (kernel == "trigonometric")


# ---- defects of public code ----


def qkv(n=70, m=70, h=2, g=1, d=16, e=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((1, h, n, d), (1, g, m, d), (1, g, m, e))
    return tuple(torch.randn(*size, generator=generator, dtype=dtype) for size in sizes)


@pytest.mark.parametrize("kernel", Performer.KERNELS)
@pytest.mark.parametrize("times", [1.5, 3.0, 100.0])
def test_an_extreme_future_key_changes_no_bit_of_the_past(kernel, times):
    """Public code takes the key shift over all positions, with an epsilon: up to 1.0 at x3."""
    q, k, v = qkv(40, 40)
    before = F.performer_attention(q, k, v, is_causal=True, kernel=kernel, features=32)
    k, v = k.clone(), v.clone()
    k[:, :, -1] *= times
    v[:, :, -1] += 50.0
    after = F.performer_attention(q, k, v, is_causal=True, kernel=kernel, features=32)
    assert torch.equal(before[:, :, :-1], after[:, :, :-1])
    assert after.isfinite().all()


@pytest.mark.parametrize("kernel", Performer.KERNELS)
def test_padding_is_neither_in_the_sums_nor_in_the_shifts(kernel):
    """Public code zeroes values only: 0.13 from the cut input, and 0.09 by what stands in the padding."""
    q, k, v = qkv(50, 70)
    k[:, :, 50:] *= 30.0
    seen = (torch.arange(70) < 50)[None, None, None]
    padded = F.performer_attention(q, k, v, attn_mask=seen, kernel=kernel, features=32)
    cut = F.performer_attention(q, k[:, :, :50], v[:, :, :50], kernel=kernel, features=32)
    torch.testing.assert_close(padded, cut, rtol=2e-5, atol=2e-6)
    k[:, :, 50:], v[:, :, 50:] = float("nan"), float("inf")
    assert torch.equal(padded, F.performer_attention(q, k, v, attn_mask=seen, kernel=kernel, features=32))
    holes = torch.rand(1, 1, 1, 70, generator=torch.Generator().manual_seed(1)) < 0.5
    q, k, v = qkv(70, 70)
    some = F.performer_attention(q, k, v, attn_mask=holes, kernel=kernel, features=32)
    keys = holes.flatten()
    torch.testing.assert_close(
        some, F.performer_attention(q, k[:, :, keys], v[:, :, keys], kernel=kernel, features=32), rtol=2e-5, atol=2e-6
    )


@pytest.mark.parametrize("read", ["", "+laser"])
@pytest.mark.parametrize("kernel", Performer.KERNELS)
def test_chunks_of_any_size_give_the_same(kernel, read):
    if kernel == "trigonometric" and read:
        return
    for mask in (Mask.causal(), Mask(), Mask.causal() & Mask.key_range(torch.tensor([9]), torch.tensor([63]))):
        call = make_call(*qkv(), f"performer:kernel={kernel},features=24{read}", mask=mask)
        whole = performer_attention(call, 70)
        for chunk in (1, 7, 64):
            torch.testing.assert_close(performer_attention(call, chunk), whole, rtol=2e-5, atol=5e-6)


def test_nothing_is_added_to_a_denominator():
    """Tiny features (keys far out) give a weight of exactly 1 to a lone key, and the same as for near ones."""
    q, k, v = qkv(1, 1)
    for times in (1.0, 10.0, 300.0):
        out = F.performer_attention(q, k * times, v, features=64)
        torch.testing.assert_close(out, v.expand_as(out), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spec", ["performer:features=16", "performer:kernel=hyperbolic,features=16+laser"])
def test_rows_that_underflow_are_computed_term_by_term(dtype, spec):
    """Queries and keys that point away from each other, as far as exp goes: some rows see nothing else."""
    q, k, v = qkv(9, 9, dtype=dtype)
    q, k = 60.0 * q.sign(), torch.cat([-60.0 * q[:, :1, :5].sign(), k[:, :, 5:]], dim=2)
    tensors = [t.clone().requires_grad_() for t in (q, k, v)]
    truth = [t.double().detach().requires_grad_() for t in tensors]
    outs = [
        attend(*t, spec, mask=Mask.causal(), backend=backend).out
        for t, backend in ((tensors, "linear"), (truth, "reference"))
    ]
    tolerance = dict(rtol=1e-3, atol=1e-3) if dtype == torch.float32 else dict(rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(outs[0].double(), outs[1], **tolerance)
    weight = qkv(9, 9, dtype=torch.float64, seed=4)[2].expand_as(outs[1])
    grads = [torch.autograd.grad((out * weight.to(out.dtype)).sum(), t) for out, t in zip(outs, (tensors, truth))]
    for mine, true in zip(*grads):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), true, **tolerance)


def test_half_precision_is_summed_in_float32():
    q, k, v = (t.bfloat16() for t in qkv(300, 300, d=32))
    out = F.performer_attention(q, k, v, is_causal=True)
    true = F.performer_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert (out.double() - true).abs().max() <= 0.005 * true.abs().max()


def test_softmax_is_approached():
    """Many features at small norms, each estimator of softmax's kernel; relu's is another one."""
    q, k, v = qkv(64, 64, d=16)
    q, k = 0.5 * q, 0.5 * k
    true = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    for kernel in Performer.KERNELS:
        out = F.performer_attention(q, k, v, is_causal=True, kernel=kernel, features=4096)
        error = (out - true).norm() / true.norm()
        assert error < 0.05 if kernel != "relu" else error > 0.1, kernel


def test_segments_of_any_layout():
    q, k, v = qkv(30, 30, dtype=torch.float64)
    numbers = torch.tensor([[5] * 4 + [-1] * 2 + [5] * 3 + [2] * 15 + [-1] * 6])
    for mask in (Mask.segments(numbers), Mask.segments(numbers) & Mask.causal()):
        for chunk in (1, 4, 64):
            out = performer_attention(make_call(q, k, v, "performer:features=9", mask=mask), chunk)
            true = attend(q, k, v, "performer:features=9", mask=mask, backend="reference").out
            torch.testing.assert_close(out, true, rtol=1e-10, atol=1e-12)
    other = torch.tensor([[2] * 10 + [5] * 20])  # queries of another layout than keys
    for mask in (Mask.segments(other, numbers), Mask.segments(other, numbers) & Mask.causal()):
        spec = "performer:features=9"
        true = attend(q, k, v, spec, mask=mask, backend="reference").out
        torch.testing.assert_close(attend(q, k, v, spec, mask=mask).out, true, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="must stand in one piece"):
        attend(q, k, v, "performer", mask=Mask.causal() & Mask.segments(torch.tensor([[1] * 10 + [2] * 10 + [1] * 10])))


# ---- the doors ----


def test_specs_and_products():
    assert AttentionSpec.parse("performer") == AttentionSpec(weights=Performer())
    text = "performer:kernel=relu,features=64,redraw=0,seed=3+laser+selective"
    assert str(AttentionSpec.parse(text)) == text
    assert AttentionSpec.parse("performer:relu").weights == Performer("relu")
    for wrong, reason in {
        "performer+window:4": "never makes a score",
        "performer+bigbird": "never makes a score",
        "performer:trigonometric+laser": "weights that sum to 1",
        "performer+learned": "does nothing to ReLU features",
        "performer:kernel=softmux": "did you mean 'softmax'",
        "performer:features=0": "at least 1",
        "performer:redraw=-1": "at least 0",
    }.items():
        with pytest.raises(UserError, match=reason):
            AttentionSpec.parse(wrong)


def test_refusals_say_why():
    q, k, v = qkv()
    call = lambda **more: attend(q, k, v, "performer", **more)
    for mask, kind in (
        (Mask.window(4), "band"), (Mask.causal(prefix=3), "causal"), (Mask.dense(torch.ones(70, 70).bool()), "dense"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"refuses a mask of kind {kind}: it sums over features"):
            call(mask=mask)
    with pytest.raises(ValueError, match="refuses a bias"):
        call(bias=ALiBi(ALiBi.default_slopes(2)))
    with pytest.raises(ValueError, match="refuses attention dropout"):
        call(dropout_p=0.1)
    with pytest.raises(ValueError, match="scale above 0"):
        call(scale=-1.0)
    ones = torch.ones(1, 2, 70, 1)
    for temperatures in (Temperatures(query=ones, value=ones[:, :1]), Temperatures(key=ones[:, :1])):
        with pytest.raises(ValueError, match="refuses a temperature on queries or keys"):
            attend(q, k, v, "performer+selective", temperatures=temperatures)
    assert attend(q, k, v, "performer+selective", temperatures=Temperatures(value=ones[:, :1])).out.isfinite().all()
    for backend in ("sdpa", "chunked"):
        with pytest.raises(ValueError, match="refuses attention 'performer'"):
            call(backend=backend)
    assert explain("performer", (q, k, v)).chosen == "linear"
    with pytest.raises(ValueError, match="has negative weights"):
        attend(q, k, v, "performer:trigonometric", want=["entropy"])
    with pytest.raises(ValueError, match="only performer has random features"):
        attend(q, k, v, "softmax", projection=torch.ones(3, 16))


def test_the_function_and_its_projections():
    q, k, v = qkv(h=4, g=2)
    out = F.performer_attention(q, k, v, is_causal=True, enable_gqa=True)
    assert torch.equal(out, F.performer_attention(q, k, v, is_causal=True))
    assert torch.equal(out, attend(q, k, v, "performer", mask=Mask.causal()).out)
    drawn = projection_of(Performer(), 16)
    assert torch.equal(out, F.performer_attention(q, k, v, is_causal=True, projection=drawn))
    alike = F.performer_attention(q, k, v, is_causal=True, projection=drawn.expand(4, -1, -1))
    torch.testing.assert_close(alike, out, rtol=1e-5, atol=1e-6)
    heads = torch.stack([draw_projection(32, 16, seed=s) for s in range(4)])
    own = F.performer_attention(q, k, v, projection=heads)
    for head in range(4):
        one = F.performer_attention(q[:, [head]], k[:, [head // 2]], v[:, [head // 2]], projection=heads[head])
        torch.testing.assert_close(own[:, [head]], one, rtol=1e-5, atol=1e-6)
    a, b = (F.performer_attention(q, k, v, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert not torch.equal(a, b)
    bare = F.performer_attention(q, k, v, kernel="relu", projection=False, scale=1.0)
    x, y = (t.repeat_interleave(4 // t.shape[1], dim=1).relu() + 1e-3 for t in (q, k))
    weights = x @ y.mT
    by_hand = weights / weights.sum(-1, keepdim=True) @ v.repeat_interleave(2, dim=1)
    torch.testing.assert_close(bare, by_hand, rtol=1e-5, atol=1e-6)
    for wrong in (
        dict(attn_mask=torch.ones(70, 70).bool()), dict(attn_mask=torch.zeros(1, 1, 1, 70)), dict(dropout_p=0.5),
        dict(projection=False), dict(projection=torch.ones(3, 5)), dict(projection=torch.ones(3, 9, 16)),
        dict(projection=drawn, generator=torch.Generator()),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"performer|projection"):
            F.performer_attention(q, k, v, **wrong)


def test_laser_asks_for_float64_and_then_refuses():
    q, k, v = qkv(30, 30)
    wide = v.clone()
    wide[:, :, 20] += 300.0  # float32 holds about 64
    out = attend(q, k, wide, "performer:features=32+laser", mask=Mask.causal()).out
    true = attend(q.double(), k.double(), wide.double(), "performer:features=32+laser", mask=Mask.causal(),
                  backend="reference").out  # fmt: skip
    torch.testing.assert_close(out.double(), true, rtol=1e-5, atol=1e-5)
    wide[:, :, 20] += 3000.0
    with pytest.raises(ValueError, match=r"laser on performer: values spread over 3\d\d\d in one channel"):
        attend(q, k, wide, "performer:features=32+laser", mask=Mask.causal())
