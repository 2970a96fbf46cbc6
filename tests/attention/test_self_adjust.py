"""Self-Adjust Softmax (arXiv 2502.18277): exact checks of formulas, Jacobians, saturation, edge cases, decoding and
causality. V0, V1, V2, V3 are the forms product, min_shift, minmax, range."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.bias import DenseBias
from clearhead.attention.mask import Mask
from clearhead.attention.spec import SelfAdjust
from clearhead.memory.cache import KVCache

BACKENDS = pytest.mark.parametrize("backend", ["chunked", "reference"])
FORMS = [f"self_adjust:form={form}" for form in SelfAdjust.FORMS]


def weights(x: Tensor, spec: str, backend: str = "chunked", visible: Tensor | None = None) -> Tensor:
    """The weights [n, m] that a spec gives to scores [n, m], read off with one-hot values."""
    n, m = x.shape
    q, k = torch.zeros(1, 1, n, 1, dtype=x.dtype), torch.zeros(1, 1, m, 1, dtype=x.dtype)
    one_hot = torch.eye(m, dtype=x.dtype)[None, None]
    mask = Mask() if visible is None else Mask.dense(visible)
    return attend(q, k, one_hot, spec, mask=mask, bias=DenseBias(x[None, None]), backend=backend).out[0, 0]


def jacobian(x: Tensor, spec: str, backend: str = "chunked") -> Tensor:
    """d weights / d scores of one row, [m, m]."""
    return torch.autograd.functional.jacobian(lambda row: weights(row[None], spec, backend)[0], x)


def ahead(gap: float, shift: float = 0.0) -> Tensor:
    """8 scores, small and random, with the first one `gap` above the next."""
    x = 0.5 * torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x[0] = x[1:].max() + gap
    return x + shift


# ---- formulas and exact Jacobians ------------------------------------------------------------------------------------


@BACKENDS
def test_formulas(backend: str) -> None:
    """The four forms, with 1e-10 in the denominator only."""
    x = 2.0 * torch.randn(5, 9, dtype=torch.float64)
    s = x.softmax(-1)
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    low0, high0 = low.clamp(max=0), high.clamp(min=0)
    expected = {
        "product": x * s,
        "min_shift": (x - low) * s,
        "minmax": (x - low) / (high - low + 1e-10) * s,
        "range": (x - low0) / (high0 - low0 + 1e-10) * s,
    }
    for form, w in expected.items():
        assert (weights(x, f"self_adjust:form={form}", backend) - w).abs().max() <= 1e-15


@BACKENDS
def test_exact_jacobians(backend: str) -> None:
    """V0  df_i/dx_k = s_i (delta_ik (1 + x_i) - x_i s_k), and V3 with its terms at the extrema; to 1e-14."""
    x = 2.0 * torch.randn(9, dtype=torch.float64)
    s, eye = x.softmax(-1), torch.eye(9, dtype=torch.float64)
    v0 = s[:, None] * (eye * (1 + x)[:, None] - x[:, None] * s[None])
    assert (jacobian(x, "self_adjust:form=product", backend) - v0).abs().max() <= 1e-14

    m, top = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    d = top - m
    r = (x - m) / d
    held = (r * s)[:, None] * (eye - s[None]) + eye * (s / d)[:, None]
    free = held.clone()
    free[:, x.argmin()] -= s * (1 - r) / d
    free[:, x.argmax()] -= s * r / d
    assert float(x.min()) < 0.0 < float(x.max())
    assert (jacobian(x, "self_adjust", backend) - free).abs().max() <= 1e-9  # the formula is without eps
    assert (jacobian(x, "self_adjust:detach_extrema=true", backend) - held).abs().max() <= 1e-9


# ---- Jacobian sweep --------------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize(
    ("spec", "figures"),
    [
        ("softmax", (1.8e-3, 5.9e-7, 2.0e-10)),
        ("self_adjust:form=product", (1.0, 1.0, 1.0)),
        ("self_adjust:form=min_shift", (1.4, 1.4, 1.4)),
        ("self_adjust", (1.5e-3, 5.1e-7, 1.7e-10)),
    ],
)
def test_saturation_at_one(spec: str, figures: tuple[float, ...], backend: str) -> None:
    """Frobenius norm with the top logit ahead by 8, 16, 24. V0 and V1 stay alive; V3 with gradient
    through the extrema dies as softmax does."""
    for gap, figure in zip((8.0, 16.0, 24.0), figures):
        assert float(jacobian(ahead(gap), spec, backend).norm()) == pytest.approx(figure, rel=0.1), f"gap {gap}"


@BACKENDS
def test_detached_extrema_keep_the_gradient(backend: str) -> None:
    """With the extrema detached the top diagonal is s / D: 0.11, 0.059, 0.04 (5.9e-2 at gap 16); without,
    5e-7 there. With all logits negative, M = 0 is a constant and V3 lives either way (3e-2)."""
    for gap, figure in ((8.0, 0.11), (16.0, 0.059), (24.0, 0.04)):
        top = jacobian(ahead(gap), "self_adjust:detach_extrema=true", backend)[0, 0]
        assert float(top) == pytest.approx(figure, rel=0.05)
    assert float(jacobian(ahead(16.0), "self_adjust", backend).norm()) == pytest.approx(5e-7, rel=0.1)
    negative = ahead(16.0, shift=-35.0)
    for spec in ("self_adjust", "self_adjust:detach_extrema=true"):
        assert float(jacobian(negative, spec, backend).norm()) == pytest.approx(3e-2, rel=0.2)


@BACKENDS
def test_no_form_cures_saturation_at_zero(backend: str) -> None:
    """Every entry of row i carries s_i."""
    x = ahead(20.0)
    s = x.softmax(-1)
    for spec in FORMS:
        assert (jacobian(x, spec, backend)[1:].abs() <= 30.0 * s[1:, None]).all()


@BACKENDS
def test_small_logits_blow_up_under_range(backend: str) -> None:
    """r does not change with the scale of x, so V3's gradient grows as 1 / D: norm times scale tends to a constant of
    the draw (0.038 for one, 0.05 for another), while softmax's norm stays at 0.12."""
    torch.manual_seed(0)
    x = torch.randn(64, dtype=torch.float64)
    products = [float(jacobian(c * x, "self_adjust", backend).norm()) * c for c in (1e-2, 1e-3, 1e-5)]
    assert products == pytest.approx([products[-1]] * 3, rel=0.05)
    assert 0.02 <= products[-1] <= 0.1
    assert float(jacobian(1e-3 * x, "softmax", backend).norm()) == pytest.approx(0.12, abs=0.01)


# ---- edge cases ------------------------------------------------------------------------------------------------------


@BACKENDS
def test_edge_cases(backend: str) -> None:
    """V3([0.7]) = 1, V3([-0.7]) = 0, zeros give zeros, all 2 is uniform, all -2 is 0; and one key's weight has no
    gradient."""

    def v3(*scores: float) -> list[float]:
        return weights(torch.tensor([scores], dtype=torch.float64), "self_adjust", backend)[0].tolist()

    assert v3(0.7) == pytest.approx([1.0], abs=1e-9)
    assert v3(-0.7) == pytest.approx([0.0], abs=1e-9)
    assert v3(0.0, 0.0, 0.0) == [0.0, 0.0, 0.0]
    assert v3(2.0, 2.0, 2.0, 2.0) == pytest.approx([0.25] * 4, abs=1e-9)
    assert v3(-2.0, -2.0) == pytest.approx([0.0, 0.0], abs=1e-9)
    for x in (0.7, -0.7):
        assert jacobian(torch.tensor([x], dtype=torch.float64), "self_adjust", backend).item() == pytest.approx(
            0.0, abs=1e-9
        )
    zeros = jacobian(torch.zeros(3, dtype=torch.float64), "self_adjust", backend)
    assert zeros.isfinite().all()


@BACKENDS
@pytest.mark.parametrize("spec", FORMS)
def test_hidden_scores_count_for_nothing(spec: str, backend: str) -> None:
    """Extrema, factor and weight are those of the visible keys alone, whatever is hidden; empty rows give 0."""
    x = torch.randn(6, 12, dtype=torch.float64)
    visible = torch.rand(6, 12) < 0.6
    visible[0] = False
    loud = torch.where(visible, x, 1e3 * torch.randn_like(x))
    w = weights(loud, spec, backend, visible[None, None])
    assert torch.equal(w, weights(x, spec, backend, visible[None, None]))
    assert (w[~visible] == 0.0).all()
    for row in range(1, 6):
        alone = weights(x[row : row + 1, visible[row]], spec, backend)
        assert torch.allclose(w[row : row + 1, visible[row]], alone, atol=1e-15)


@BACKENDS
def test_row_sums(backend: str) -> None:
    """V3's row sum is in [0, 1], about 0.54 for tiny random logits, 1 when saturated on a positive one;
    V0's is E_s[x], about 0 there."""
    tiny = 1e-2 * torch.randn(500, 64, dtype=torch.float64)
    for scale in (1e-2, 1.0, 10.0):
        total = weights(scale * torch.randn(200, 64, dtype=torch.float64), "self_adjust", backend).sum(-1)
        assert ((total >= 0.0) & (total <= 1.0)).all()
    assert float(weights(tiny, "self_adjust", backend).sum(-1).mean()) == pytest.approx(0.54, abs=0.06)
    assert float(weights(ahead(40.0)[None], "self_adjust", backend).sum()) == pytest.approx(1.0, abs=1e-6)
    assert float(weights(tiny, "self_adjust:form=product", backend).sum(-1).abs().mean()) < 1e-2


@BACKENDS
def test_a_shift_of_the_scores_matters(backend: str) -> None:
    """f(x + c) = f(x) + c s for V0; V1 and V2 do not move; V3 does once a row is on one side of 0."""
    x = torch.randn(4, 9, dtype=torch.float64)
    c, s = 4.0, x.softmax(-1)
    change = lambda form: (
        weights(x + c, f"self_adjust:form={form}", backend) - weights(x, f"self_adjust:form={form}", backend)
    )
    assert torch.allclose(change("product"), c * s, atol=1e-14)
    assert change("min_shift").abs().max() <= 1e-14
    assert change("minmax").abs().max() <= 1e-14
    assert change("range").abs().max() > 1e-3


def test_one_pass_form() -> None:
    """With Z = sum e^x, A0 = sum e^x v, A1 = sum e^x x v:  V0 = A1 / Z  and  V3 = (A1 - m A0) / (Z (M - m))."""
    x, v = torch.randn(5, 9, dtype=torch.float64), torch.randn(9, 3, dtype=torch.float64)
    z, a0, a1 = x.exp().sum(-1, keepdim=True), x.exp() @ v, (x.exp() * x) @ v
    m, top = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    assert torch.allclose(weights(x, "self_adjust:form=product") @ v, a1 / z, atol=1e-14)
    assert torch.allclose(weights(x, "self_adjust") @ v, (a1 - m * a0) / (z * (top - m)), atol=1e-9)


# ---- decode and causality --------------------------------------------------------------------------------------------


@BACKENDS
@pytest.mark.parametrize("spec", FORMS)
def test_cached_decode(spec: str, backend: str) -> None:
    """Token by token against the full forward, to 1e-5 in fp32. A port through `tril` sees key 0 only, and fails."""
    q, k, v = (torch.randn(2, 2, 30, 16) for _ in range(3))
    full = attend(q, k, v, spec, mask=Mask.causal(), backend=backend).out
    cache = KVCache.allocate(2, 2, 30, 16)
    for t in range(30):
        step = (x[:, :, t : t + 1] for x in (q, k, v))
        out = attend(*step, spec, mask=Mask.causal(), state=cache, backend=backend).out
        assert (out - full[:, :, t : t + 1]).abs().max() <= 1e-5
    scores = q[:, :, -1:] @ k.mT / 4.0
    low, high = scores.amin(-1, keepdim=True).clamp(max=0), scores.amax(-1, keepdim=True).clamp(min=0)
    by_tril = ((scores - low) / (high - low) * scores.softmax(-1)).tril() @ v
    assert (by_tril - full[:, :, -1:]).abs().max() > 0.1


@BACKENDS
@pytest.mark.parametrize("spec", FORMS)
def test_causality_is_exact(spec: str, backend: str) -> None:
    """An edit of the future changes nothing at all."""
    q, k, v = (torch.randn(2, 2, 30, 16) for _ in range(3))
    out = attend(q, k, v, spec, mask=Mask.causal(), backend=backend).out
    for x in (q, k, v):
        x[:, :, 17:] = 9.0 * torch.randn_like(x[:, :, 17:])
    moved = attend(q, k, v, spec, mask=Mask.causal(), backend=backend).out
    assert torch.equal(moved[:, :, :17], out[:, :, :17])
    assert not torch.equal(moved[:, :, 17:], out[:, :, 17:])


# ---- ties ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [5, 128])
@pytest.mark.parametrize("spec", FORMS)
def test_tied_extrema_share_the_gradient(spec: str, width: int) -> None:
    """Repeated tokens have equal scores. A tied minimum or maximum takes its gradient in equal shares, as `amin`'s and
    `amax`'s own do, so that equal tokens are treated alike and both backends agree."""
    x = torch.randn(6, width, dtype=torch.float64).round()
    assert (x == x.amin(-1, keepdim=True)).sum() > 6
    g = torch.randn(6, width, dtype=torch.float64)

    def gradient(backend: str) -> Tensor:
        leaf = x.clone().requires_grad_()
        return torch.autograd.grad(weights(leaf, spec, backend), leaf, g)[0]

    assert torch.allclose(gradient("chunked"), gradient("reference"), rtol=1e-9, atol=1e-12)


def test_minmax_with_one_visible_key() -> None:
    """A documented corner: u = l, so w = 0 and, unless the extrema are held, its gradient is 0 too."""
    x = torch.tensor([0.3], dtype=torch.float64)
    assert weights(x[None], "self_adjust:form=minmax").item() == 0.0
    assert jacobian(x, "self_adjust:form=minmax").item() == 0.0
    assert math.isfinite(jacobian(x, "self_adjust:form=minmax,detach_extrema=true").item())
