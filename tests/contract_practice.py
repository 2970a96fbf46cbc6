"""Rules 6 to 9 of the contract: low precision, compiled graphs, uninitialised memory, dropout. See `contract.py`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.spec import AttentionSpec, Laser, Performer, SelfAdjust, Softmax
from tests.conftest import poison
from tests.contract_cases import BACKEND_NAMES, DTYPES, PLAIN, SPECS, Case, Inputs, make_inputs
from tests.contract_tools import (
    IDEAS,
    TOLERANCE,
    Result,
    check,
    error_of,
    exact_after_temperatures,
    is_laser,
    run,
    same,
    sweep,
    truth,
)

LASERS = ["laser", "laser+selective", "laser+window:40"]
TILED = [s for s in PLAIN if not isinstance(s.weights, Performer)]  # its operator: tests/kernels/test_linear.py
backends = pytest.mark.parametrize("backend", BACKEND_NAMES)


def specs(texts: tuple[str, ...] | list[str]) -> Callable:
    return pytest.mark.parametrize("spec", [pytest.param(AttentionSpec.parse(text), id=text) for text in texts])


def in_sample(text: str, sample: tuple[str, ...]) -> tuple[pytest.MarkDecorator, ...]:
    return () if text in sample else (pytest.mark.full,)


# ---- 6 ---------------------------------------------------------------------------------------------------------------


def fused_rival(inputs: Inputs) -> Result:
    """PyTorch's own kernel on the same numbers in the same dtype, with the same mask and bias written out."""
    c, dtype, device = inputs.case, inputs.tensors["q"].dtype, inputs.d_out.device

    def call(t: dict[str, Tensor]) -> Tensor:
        pattern = c.spec.pattern.within(inputs.mask, c.h, c.m)
        seen = pattern.dense_tensor(c.n, c.m, device)
        told = None if seen is None else torch.zeros((), dtype=dtype, device=device).where(seen, -math.inf)
        if told is not None:
            told = told.expand(*told.shape[:2], c.n, c.m)
        q, k, v = (t[name] for name in "qkv")
        if "tau_q" in t:
            q = (q * t["tau_q"]).to(dtype)
        if "tau_k" in t:
            k = (k * t["tau_k"].unsqueeze(-1)).to(dtype)
        if "tau_v" in t:
            v = (v * t["tau_v"]).to(dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=told, enable_gqa=c.h != c.g)

    return run(inputs, "", call=call)


class TestRule6LowPrecision:
    """Half precision costs at most twice what it costs SDPA on the same inputs, or a mechanism's own stated bound.

    Self-Adjust and LASER compute in float32 whatever comes in, so against their own reference what is left is the
    rounding of output and gradients: at most one unit roundoff, eps / 2, in the Euclidean norm (temperatures: two).
    """

    rule = 6

    @sweep(
        [dict(mask="causal", n=128, m=128, d=64, e=64, h=4), dict(mask="left"), dict(mask="dense", n=63, m=128)],
        ("bf16", "fp16"),
    )
    def test_error(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        ours = run(inputs, backend)
        if isinstance(case.spec.weights, Softmax) and not is_laser(case.spec):
            true = truth(case, device)
            rival = dict(fused_rival(inputs).items())
            for (name, x), (_, t) in zip(ours.items(), true.items(), strict=True):
                mine, theirs = error_of(x, t), error_of(rival[name].nan_to_num(), t)
                assert mine <= 2.0 * theirs, f"{name}: error {mine:.1e}, SDPA's {theirs:.1e}"
        else:
            roundoff = torch.finfo(DTYPES[dtype]).eps / 2
            true = exact_after_temperatures(inputs)
            check(ours, true, roundoff if case.spec.temperature is None else 2 * roundoff)

    @specs([s.text for s in PLAIN])
    @backends
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scores_of_ten_thousand(
        self, spec: AttentionSpec, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        """Scores of +-1e4 (and 0): finite everywhere, and right to a few parts in a thousand."""
        case = Case(spec, "causal", n=63, m=63, d=64, e=32)
        inputs = make_inputs(case, DTYPES[dtype], device)
        true_inputs = make_inputs(case, torch.float64, device)
        for x in (inputs, true_inputs):
            signs = torch.tensor([1.0, -1.0, 0.0], dtype=x.d_out.dtype, device=device)
            with torch.no_grad():
                x.tensors["q"].fill_(35.25)  # 35.25 * 35.5 * 64 / sqrt(64) = 1.0e4
                x.tensors["k"].copy_((35.5 * signs[torch.arange(1, 64) % 3])[None, None, :, None])
            x.d_out *= 2.0**-12  # the true gradient grows with the scores; fp16 must hold it
        if not refused(inputs, backend):
            check(run(inputs, backend), run(true_inputs, "reference"), {"fp32": 2e-3, "fp64": 1e-9}.get(dtype, 1.5e-2))

    @specs(LASERS)
    @backends
    @pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
    def test_laser_loses_little_at_small_spread(
        self, spec: AttentionSpec, backend: str, autocast: bool, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        """With bf16 inputs and outputs: a third of the error of exp and log in fp32 around a bf16 attention at value
        std 0.1 and 0.5, half of it at 1 (that rival: 9.3e-2, 2.1e-2, 1.0e-2 by `ERRORS` of attention/test_laser)."""
        for std, times in ((0.1, 3.0), (0.5, 3.0), (1.0, 2.0)):
            inputs = make_inputs(
                Case(spec, "causal", n=128, m=128, d=64, e=64, b=1), torch.bfloat16, device, grad=False
            )
            # With a temperature, the values as it leaves them have this std.
            inputs.tensors["v"] *= std / (inputs.tensors["v"] * inputs.tensors.get("tau_v", 1.0)).float().std()
            if refused(inputs, backend):
                return
            true = exact_after_temperatures(inputs, torch.float64).out
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
                ours = run(inputs, backend).out
            inputs.tensors["v"], shift = _shifted(inputs.tensors)
            inputs.tensors.pop("tau_v", None)
            around = (fused_rival(inputs).out.float().log() + shift).bfloat16()
            mine, theirs = float((ours - true).norm()), float((around - true).norm())
            assert mine * times <= theirs, f"value std {std}: error {mine:.2e}, the rival's {theirs:.2e}"

    @backends
    @pytest.mark.parametrize("spec", [pytest.param(s, id=s.text) for s in PLAIN])
    def test_autocast(
        self, spec: AttentionSpec, backend: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        """Inside bf16 autocast, where training calls it, half-precision inputs cost no more than outside. A backward
        pass inside it is PyTorch's "not recommended", but our own operators stand it."""
        inputs = make_inputs(Case(spec, "causal", n=63, m=63), torch.bfloat16, device)
        if refused(inputs, backend):
            return
        outside = run(inputs, backend)
        t = inputs.tensors
        for backward_inside in (False, True)[: 1 if backend == "reference" else 2]:
            with torch.autocast(device.type, dtype=torch.bfloat16):
                out = attend(t["q"], t["k"], t["v"], spec, mask=inputs.mask, backend=backend).out
                if backward_inside:
                    inside = run(inputs, "", call=lambda _, out=out: out)
            if not backward_inside:
                inside = run(inputs, "", call=lambda _, out=out: out)
            check(inside, outside, 1e-3)

    @backends
    @specs(LASERS)
    @pytest.mark.parametrize(
        ("dtype", "rise", "tolerance"),
        [
            *(("fp32", rise, 1e-5) for rise in (20, 60, 100, 2000)),
            *(("fp16", rise, 1e-3) for rise in (20, 100, 2000)),
            *(("fp64", 2000, 1e-10), ("bf16", 100, 8e-3)),
        ],
    )
    def test_laser_later_outlier(
        self, spec: AttentionSpec, backend: str, dtype: str, rise: int, tolerance: float, device: torch.device,
        refused: Callable[..., bool],
    ) -> None:  # fmt: skip
        """One later value far above the rest leaves earlier outputs right, although their exp underflows beside
        it, and itself and all gradients right too."""
        case = Case(spec, "causal", n=63, m=63)
        inputs, plain = make_inputs(case, DTYPES[dtype], device), make_inputs(case, torch.float64, device)
        for x in (inputs, plain):
            with torch.no_grad():
                x.tensors["v"][:, :, 50, ::3] += float(rise)
                x.tensors["v"].copy_(x.tensors["v"].to(DTYPES[dtype]))
        if refused(inputs, backend):
            return
        result, true = run(inputs, backend), run(plain, "reference")
        early = slice(0, 50)
        assert result.out.isfinite().all()
        assert error_of(result.out[:, :, early], true.out[:, :, early]) <= tolerance
        loose = spec.temperature is not None and dtype in ("bf16", "fp16")  # a rounded value near 2000 moves the rest
        if not loose:
            check(result, true, max(tolerance, 2e-5 if dtype == "fp32" else 0.0))

    @backends
    def test_laser_weights_below_the_smallest_number(
        self, backend: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        """A weight of e^-200, which fp32 cannot hold, on a value of 2000: log(A exp V) = -200 + 2000."""
        case = Case(AttentionSpec(read=Laser()), n=1, m=2, d=1, e=1, b=1, h=1, g=1)
        inputs = make_inputs(case, torch.float32, device)
        with torch.no_grad():
            inputs.tensors["q"].fill_(1.0)
            inputs.tensors["k"].copy_(torch.tensor([0.0, -200.0])[None, None, :, None])
            inputs.tensors["v"].copy_(torch.tensor([0.0, 2000.0])[None, None, :, None])
        inputs.d_out.fill_(1.0)
        if refused(inputs, backend):
            return
        result = run(inputs, backend)
        assert result.out.item() == pytest.approx(1800.0)
        assert result.grads["v"].flatten().tolist() == pytest.approx([0.0, 1.0])
        assert result.grads["q"].item() == pytest.approx(-200.0)  # d out / d score = p - A = (-1, 1)


def _shifted(t: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """exp(V - max) in fp32, cast to the dtype of q, and the shift: the rival's values."""
    v = t["v"].float() * t["tau_v"].float() if "tau_v" in t else t["v"].float()
    v = v.to(t["v"].dtype).float()  # the rival meets the same rounded values
    shift = v.amax(dim=2, keepdim=True)
    return (v - shift).exp().to(t["q"].dtype), shift


# ---- 7 ---------------------------------------------------------------------------------------------------------------


class TestRule7Compile:
    """`torch.compile(fullgraph=True)` gives the same result, forward and backward; operators pass `opcheck`."""

    rule = 7

    @sweep(
        [
            dict(mask="causal", h=4),
            dict(mask="window", bias="alibi:fixed"),
            dict(mask="left", bias="dense_keys"),
            dict(mask="causal_segments", bias="alibi"),
            dict(mask="dense", n=7, m=63),
            dict(mask="causal_left", bias="fire"),
            dict(mask="causal", n=63, bias="kerple"),
        ],
        also=(),
        each=IDEAS,
    )
    def test_same_result(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool],
        record_property: Callable[[str, object], None],
    ) -> None:  # fmt: skip
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return

        def call(t: dict[str, Tensor], name: str = backend) -> Tensor:
            out = attend(t["q"], t["k"], t["v"], case.spec, backend=name, **inputs.arguments())
            return out.out

        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        if backend == "sdpa" and is_laser(case.spec):
            # Only a compiled graph is refused, so `explain` outside of one cannot say it.
            with pytest.raises(Exception, match="LASER's guard") as caught:
                run(inputs, backend, call=compiled)
            assert "an operator of its own" in str(caught.value)
            record_property("refused", "in a compiled graph, where only an operator may read the values' spread")
            compiled = torch.compile(lambda t: call(t, "auto"), fullgraph=True, backend="aot_eager")
        check(run(inputs, backend, call=compiled), run(inputs, backend), TOLERANCE[dtype])

    @pytest.mark.parametrize("backend", ["chunked"])
    @pytest.mark.parametrize("spec", [pytest.param(s, id=s.text, marks=in_sample(s.text, IDEAS[:3])) for s in TILED])
    @pytest.mark.parametrize(
        ("mask", "bias"),
        [("causal", "alibi"), ("causal_segments", "dense_keys"), ("left", "none"), ("causal_segments", "fire")],
    )
    def test_opcheck(self, spec: AttentionSpec, backend: str, mask: str, bias: str, device: torch.device) -> None:
        """torch.library's own checks of the chunked kernel's operators, and of their backward operators."""
        from clearhead.attention import laser
        from clearhead.kernels import chunked

        inputs = make_inputs(Case(spec, mask, bias, n=9, m=9, d=4, e=4, h=2, g=1), torch.float32, device)
        code, mask_tensors = inputs.mask.resolve(9, 9).encode()
        bias_object = inputs.bias()
        name, bias_tensors = ("", []) if bias_object is None else (bias_object.text, bias_object.tensors())
        t = inputs.tensors
        told = (t["q"], t["k"], t["v"], spec.text, code, mask_tensors, name, bias_tensors, 0.5)
        if is_laser(spec):
            torch.library.opcheck(laser.laser_forward, told)
            detached = [x.detach() for x in told[:3]]
            told = (*detached, *told[3:7], [x.detach() for x in bias_tensors], 0.5)
            torch.library.opcheck(laser.laser_backward, (inputs.d_out, *told, bool(bias_tensors)))
            return
        seed = torch.zeros((), dtype=torch.int64)
        torch.library.opcheck(chunked.chunked_forward, (*told, 0.0, seed))
        out = chunked.chunked_forward(*told, 0.0, seed).detach()
        told = (*(x.detach() for x in told[:3]), *told[3:7], [x.detach() for x in bias_tensors], 0.5)
        torch.library.opcheck(chunked.chunked_backward, (inputs.d_out, out, *told, 0.0, seed, bool(bias_tensors)))


# ---- 8 ---------------------------------------------------------------------------------------------------------------


class TestRule8UninitialisedMemory:
    """Poisoned memory (NaN) changes nothing. Every other test of the suite runs poisoned altogether."""

    rule = 8

    @sweep(
        [
            dict(mask="all_of_them", h=4),
            dict(mask="causal", n=200, m=7),  # whole tiles of queries see nothing
            dict(mask="right", n=7, m=63, bias="alibi"),
        ]
    )
    def test_nan_in_fresh_memory(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if not refused(inputs, backend):
            with poison():
                poisoned = run(inputs, backend)
            same(poisoned, run(inputs, backend))

    def test_the_poison_works(self) -> None:
        scope = {"__name__": "clearhead.somewhere", "torch": torch}
        code = "a = torch.empty(3); b = torch.empty_like(a); c = a.new_empty(2); d = torch.empty(2, dtype=torch.int64)"
        exec(code, scope)
        assert all(bool(scope[name].isnan().all()) for name in "abc")  # type: ignore[attr-defined]
        assert scope["d"].tolist() == [torch.iinfo(torch.int64).max] * 2  # type: ignore[attr-defined]


# ---- 9 ---------------------------------------------------------------------------------------------------------------

DROPPING = [s for s in SPECS if s.temperature is None]


class TestRule9Dropout:
    """Dropout acts on the weights (after any product) and has the right expectation, or is refused with the reason."""

    rule = 9

    @backends
    @pytest.mark.parametrize("p", [0.1, 0.5])
    @pytest.mark.parametrize("spec", [pytest.param(s, id=s.text) for s in SPECS])
    def test_expectation(
        self, spec: AttentionSpec, backend: str, p: float, device: torch.device, refused: Callable[..., bool],
        record_property: Callable[[str, object], None],
    ) -> None:  # fmt: skip
        """The mean over 400 draws (as batch rows) is the output without dropout, within 5 standard errors on average
        over rows: the mean square of the standardised deviation is 1 in expectation."""
        draws, case = 400, Case(spec, "causal_left", n=24, m=24, d=16, e=16, b=1, h=2, g=1)
        inputs = make_inputs(case, torch.float32, device, grad=False)
        t = inputs.tensors
        spread = lambda x: x if x.shape[0] != 1 or x.dim() < 3 else x.expand(draws, *x.shape[1:])
        many = Inputs(case, {name: spread(x) for name, x in t.items()}, inputs.d_out, mask=inputs.mask)
        if is_laser(spec):
            with pytest.raises(ValueError, match="laser refuses attention dropout: rows of dropped weights"):
                run(many, backend, dropout_p=p)
            record_property("refused", "laser refuses attention dropout: dropped rows do not sum to 1")
            return
        if refused(many, backend, dropout_p=p):
            return
        out = run(many, backend, dropout_p=p).out.double()
        plain = run(inputs, backend).out.double()
        variance = out.var(dim=0, keepdim=True)
        varies = variance > 1e-8
        assert varies.float().mean() > 0.9, "hardly anything is dropped"
        z2 = ((out.mean(dim=0, keepdim=True) - plain).square() / (variance / draws))[varies]
        # About h * n = 48 independent rows, so the mean of z^2 is 1 +- 0.2.
        assert 0.3 < float(z2.mean()) < 2.0, f"mean z^2 = {float(z2.mean()):.2f}"
        # The size of the noise: Var = p / (1 - p) * sum_k (w_k v_k)^2.
        wanted = self._variance(inputs, p)
        assert float((variance / wanted.clamp_min(1e-12))[varies].mean()) == pytest.approx(1.0, abs=0.1)

    @staticmethod
    def _variance(inputs: Inputs, p: float) -> Tensor:
        t, args = inputs.tensors, inputs.arguments()
        w = attend(t["q"], t["k"], t["v"], inputs.case.spec, want=["weights"], **args).extras["weights"].double()
        v = t["v"].double() * t["tau_v"] if "tau_v" in t else t["v"].double()
        return p / (1.0 - p) * (w.square() @ v.square())

    @backends
    @pytest.mark.parametrize("spec", [pytest.param(s, id=s.text) for s in SPECS if not is_laser(s)])
    def test_backward_uses_the_same_mask(
        self, spec: AttentionSpec, backend: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        """With the seed fixed the output is a smooth function: directional differences equal the gradient."""
        case = Case(spec, "causal_left", "alibi:fixed" if backend == "sdpa" else "alibi", n=24, m=24, d=16, e=16, h=4)
        inputs = make_inputs(case, torch.float64, device)
        if refused(inputs, backend, dropout_p=0.3):
            return
        if isinstance(spec.weights, SelfAdjust) and spec.weights.detach_extrema:
            names = ["v"]  # no difference quotient sees constants by decree
        else:
            names = [name for name, x in inputs.tensors.items() if x.requires_grad]

        def value() -> Tensor:
            torch.manual_seed(7)
            t = inputs.tensors
            out = attend(t["q"], t["k"], t["v"], spec, backend=backend, dropout_p=0.3, **inputs.arguments()).out
            return (out * inputs.d_out).sum()

        grads = torch.autograd.grad(value(), [inputs.tensors[name] for name in names])
        for name, grad in zip(names, grads):
            x = inputs.tensors[name]
            direction, step = torch.randn(x.shape, dtype=x.dtype).to(device), 1e-6
            with torch.no_grad():
                x += step * direction
                up = value()
                x -= 2 * step * direction
                down = value()
                x += step * direction
            slope = float((up - down) / (2 * step))
            assert slope == pytest.approx(float((grad * direction).sum()), rel=1e-5, abs=1e-5), name

    @backends
    @specs(["softmax", "self_adjust"])
    def test_everything_dropped_is_zero(
        self, spec: AttentionSpec, backend: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(Case(spec, "causal"), torch.float32, device)
        if not refused(inputs, backend, dropout_p=1.0):
            result = run(inputs, backend, dropout_p=1.0)
            assert all((x == 0.0).all() for _, x in result.items())
