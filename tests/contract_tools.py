"""How the contract suite runs and judges: one call forward and backward, two sources of truth, refusals, the sweep.

`truth` is the dense reference in float64; `by_hand` checks that reference: row by row, from the papers' formulas and a
plain Python rule of who sees whom, sharing no code with the package.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.bias import ALiBi, Bias, DenseBias
from clearhead.attention.explain import explain
from clearhead.attention.fire import FireBias
from clearhead.attention.kerple import KerpleBias
from clearhead.attention.selective import selective
from clearhead.attention.spec import AttentionSpec, Laser, SelfAdjust, Softmax
from clearhead.attention.t5 import T5Bias
from clearhead.attention.terms import Rows
from tests.contract_cases import (
    BACKEND_NAMES,
    SPECS,
    T5_DISTANCE,
    Case,
    Inputs,
    Layout,
    document,
    make_inputs,
    offsets_by_hand,
    sees_by_hand,
)

# Relative error in the Euclidean norm, output and every gradient. Half precision: a few roundings of inputs and output.
TOLERANCE = {"fp64": 1e-10, "fp32": 2e-5, "bf16": 1.5e-2, "fp16": 2e-3}
# One for each idea: what the sample takes where it cannot take every spec.
IDEAS = ("softmax", "laser", "self_adjust", "laser+selective", "self_adjust:form=product+window:40")


@dataclass
class Result:
    """Output and gradients by name, detached.

    `summands`: by gradient, the Euclidean norm of the terms that it sums, where they mostly cancel: no sum is better
    than the roundings of its terms. A temperature per head sums q * d q / tau over tokens; a constant that FIRE adds to
    all scores of a head sums d scores, to 0 under softmax; c and L sum d scores times what each bias has of them.
    """

    out: Tensor
    grads: dict[str, Tensor]
    summands: dict[str, float] = field(default_factory=dict)

    def items(self) -> list[tuple[str, Tensor]]:
        return [("out", self.out), *(("d " + name, g) for name, g in self.grads.items())]


def run(inputs: Inputs, backend: str, call: Callable[..., Tensor] | None = None, **more: object) -> Result:
    """Forward and backward of `attend` (or of `call`, a compiled twin of it)."""
    t = inputs.tensors
    if call is None:
        out = attend(
            t["q"], t["k"], t["v"], inputs.case.spec, backend=backend, **inputs.arguments(), **more  # type: ignore[arg-type]
        ).out  # fmt: skip
    else:
        out = call(t)
    leaves = {name: x for name, x in t.items() if x.requires_grad}
    if not leaves:
        return Result(out.detach(), {})
    grads = torch.autograd.grad(out, list(leaves.values()), inputs.d_out, allow_unused=True)
    result = Result(
        out.detach(), {name: torch.zeros_like(x) if g is None else g for (name, x), g in zip(leaves.items(), grads)}
    )
    if "d tau_q" in dict(result.items()) and t["tau_q"].shape[2] == 1:
        terms = (t["q"].detach() * result.grads["q"]).sum(-1, keepdim=True) / t["tau_q"].detach()
        result.summands["d tau_q"] = float(terms.double().norm())
    whole = result.out.shape[:3] == (inputs.case.b, inputs.case.h, inputs.case.n) and inputs.case.m > 0
    if whole and isinstance(inputs.bias(), FireBias) and "bias_0" in leaves:
        result.summands |= _summands_of_fire(inputs)
    return result


def _summands_of_fire(inputs: Inputs) -> dict[str, float]:
    """With the bias as a dense tensor, in float64: its gradient is that of the scores."""
    c, bias = inputs.case, inputs.bias()
    t = {name: x.detach().double() for name, x in inputs.tensors.items()}
    assert bias is not None
    mask = inputs.mask.resolve(c.n, c.m)
    device = inputs.d_out.device
    rows = Rows(torch.arange(c.n, device=device), torch.arange(c.m, device=device), mask.resolved_offset())
    held = [x.detach().double() if x.is_floating_point() else x for x in bias.tensors()]

    def written(nudged: int | None = None, by: float = 0.0) -> Tensor:
        tensors = [x + by if i == nudged else x for i, x in enumerate(held)]
        return bias.with_tensors(tensors).within(mask.terms).block(rows).expand(c.b, c.h, c.n, c.m)

    dense = DenseBias(written().contiguous().requires_grad_())
    temperatures = replace(inputs, tensors=t).temperatures()
    out = attend(
        t["q"], t["k"], t["v"], c.spec, mask=inputs.mask, bias=dense, temperatures=temperatures, backend="reference"
    ).out
    (d_scores,) = torch.autograd.grad(out, dense.values, inputs.d_out.double().expand_as(out))
    whole, step = float(d_scores.norm()), 1e-6
    found = {"d bias_1": whole, "d bias_3": whole}  # the levels, and the base
    for i in (4, 5):  # c and L
        slopes = (written(i, step) - written(i, -step)) / (2 * step)
        found[f"d bias_{i}"] = float((d_scores * slopes).norm())
    return found


@functools.lru_cache(maxsize=48)
def truth(case: Case, device: torch.device) -> Result:
    """The dense reference in float64."""
    return run(make_inputs(case, torch.float64, device), "reference")


def exact_after_temperatures(inputs: Inputs, dtype: torch.dtype | None = None) -> Result:
    """The float64 reference on queries, keys and values as the temperatures leave them, rounded to their dtype.

    That rounding moves scores, and Self-Adjust's gradient jumps where the largest or smallest score changes place.
    """
    spec, dtype = inputs.case.spec, dtype or inputs.tensors["q"].dtype

    def call(t: dict[str, Tensor]) -> Tensor:
        told = {f"{n}_temperature": t.get(f"tau_{n[0]}") for n in ("query", "key", "value")}
        q, k, v = (x.double() for x in selective(t["q"], t["k"], t["v"], **told))
        bare = replace(spec, temperature=None)
        return attend(q, k, v, bare, mask=inputs.mask, bias=inputs.bias(), backend="reference").out.to(dtype)

    return run(inputs, "", call=call)


def true_for(inputs: Inputs) -> Result:
    """The truth that a run is held to: `truth`, or in half precision with temperatures `exact_after_temperatures`."""
    q = inputs.tensors["q"]
    if inputs.case.spec.temperature is not None and q.dtype in (torch.bfloat16, torch.float16):
        return exact_after_temperatures(inputs)
    return truth(inputs.case, q.device)


def refusal(inputs: Inputs, backend: str, **more: object) -> str | None:
    """Why a backend refuses this call, or None. The refusal is checked: `attend` raises with the same words."""
    t = inputs.tensors
    like, arguments = (t["q"], t["k"], t["v"]), {**inputs.arguments(), **more}
    try:
        verdicts = {v.backend: v for v in explain(inputs.case.spec, like, **arguments).verdicts}
    except ValueError as error:  # a performer itself refuses masks and biases, whatever the backend
        told = str(error)
        if not re.match("performer refuses (a bias|a mask of kind|attention dropout|float16)", told):
            raise
        with pytest.raises(ValueError, match=re.escape(told)):
            attend(*like, inputs.case.spec, backend=backend, **arguments)  # type: ignore[arg-type]
        return told
    if verdicts[backend].verdict != "refused":
        return None
    reason = verdicts[backend].reason
    assert reason, "a refusal without a reason"
    with pytest.raises(ValueError, match=re.escape(reason)):
        attend(*like, inputs.case.spec, backend=backend, **arguments)  # type: ignore[arg-type]
    return reason


def is_laser(spec: AttentionSpec) -> bool:
    return isinstance(spec.read, Laser)


def error_of(x: Tensor, true: Tensor, floor: float = 0.0) -> float:
    """Relative error in the Euclidean norm; where the truth is nearly 0, relative to a tenth for each element."""
    floor = max(floor, 0.1 * true.numel() ** 0.5)
    return float((x.double() - true.double()).norm() / true.double().norm().clamp_min(floor))


def check(result: Result, true: Result, tolerance: float) -> None:
    """Every tensor of the result, finite and within the tolerance; all failures in one message."""
    wrong = []
    for (name, x), (_, t) in zip(result.items(), true.items(), strict=True):
        assert x.shape == t.shape, f"{name}: shape {tuple(x.shape)}, expected {tuple(t.shape)}"
        error = error_of(x, t, true.summands.get(name, 0.0))
        if not error <= tolerance:  # NaN fails too
            wrong.append(f"{name}: relative error {error:.2e} > {tolerance:.1e}")
    assert not wrong, "; ".join(wrong)


# ---- the reference's own truth ---------------------------------------------------------------------------------------


def by_hand(inputs: Inputs) -> Result | None:
    """Attention row by row in float64, from the formulas; None for a choice that has no formula here yet."""
    case, t = inputs.case, inputs.tensors
    spec, sees, offset = case.spec, sees_by_hand(case), offsets_by_hand(case)
    known = isinstance(spec.weights, Softmax | SelfAdjust) and spec.pattern.name in ("full", "window")
    if not known or spec.read.name not in ("mean", "laser"):
        return None
    q, k, v = t["q"], t["k"], t["v"]
    if "tau_q" in t:
        q = q * t["tau_q"]
    if "tau_k" in t:
        k, v = k * t["tau_k"].unsqueeze(-1), v * t["tau_v"]
    rows, bias = [], inputs.bias()
    for b, h, i in itertools.product(range(case.b), range(case.h), range(case.n)):
        p, group = i + offset[b], h // (case.h // case.g)
        js = sees[b, h, i].nonzero().flatten().tolist()
        if not js:
            rows.append((q[b, h, i, :1] * 0.0).expand(case.e))
            continue
        x = (k[b, group, js] @ q[b, h, i]) / case.d**0.5
        if bias is not None:
            x = x + _bias_by_hand(bias, case, b, h, i, p, js)
        w = _weights_by_hand(spec, x)
        values = v[b, group, js]
        rows.append((w @ values.exp()).log() if is_laser(spec) else w @ values)
    out = torch.stack(rows).view(case.b, case.h, case.n, case.e)
    return run(inputs, "", call=lambda _: out)


def _bias_by_hand(bias: Bias, case: Case, b: int, h: int, i: int, p: int, js: list[int]) -> Tensor:
    """What a bias adds to the scores of row i, whose position is p, at the keys js: the papers' formulas."""
    t = bias.tensors()
    if isinstance(bias, DenseBias):
        return t[0].expand(case.b, case.h, case.n, case.m)[b, h, i, js]
    if isinstance(bias, T5Bias):
        return t[0][h, [_bucket_by_hand(j - p, t[0].shape[1] // 2) for j in js]]
    far = torch.tensor([abs(p - j) for j in js], dtype=t[0].dtype, device=t[0].device)
    if isinstance(bias, ALiBi):
        return -t[0][h] * far
    if isinstance(bias, KerpleBias):
        return -t[0][h] * ((1.0 + t[1][h] * far).log() if bias.form == "log" else far ** t[1][h])
    assert isinstance(bias, FireBias)
    weight, level, out, base, c, threshold = t
    place = max(p - document(case.mask, Layout(case), b, p)[0], 0)
    longest = max(threshold, threshold.new_tensor([float(place)]))
    x = (c * far + 1.0).log() / (c * longest + 1.0).log()
    return (weight * x[:, None] + level).relu() @ out[h] + base[h]


def _bucket_by_hand(distance: int, side: int) -> int:
    """The released T5's rule for attention that looks both ways."""
    far, exact = abs(distance), side // 2
    if far >= exact:
        share = math.log(far / exact) / math.log(T5_DISTANCE / exact)
        far = min(exact + int(share * (side - exact) + 1e-9), side - 1)
    return far + (side if distance > 0 else 0)


def _weights_by_hand(spec: AttentionSpec, x: Tensor) -> Tensor:
    powers = (x - x.detach().max()).exp()
    s = powers / powers.sum()
    if isinstance(spec.weights, Softmax):
        return s
    low, high = min(x, key=Tensor.item), max(x, key=Tensor.item)
    if spec.weights.detach_extrema:
        low, high = low.detach(), high.detach()
    zero = torch.zeros_like(low)
    if spec.weights.form == "product":
        return x * s
    if spec.weights.form == "min_shift":
        return (x - low) * s
    if spec.weights.form == "minmax":
        return (x - low) / (high - low + 1e-10) * s
    low, high = torch.minimum(low, zero), torch.maximum(high, zero)
    return (x - low) / (high - low + 1e-10) * s


# ---- the sweep -------------------------------------------------------------------------------------------------------


def sweep(
    variations: list[dict],
    dtypes: tuple[str, ...] = ("fp32",),
    *,
    also: tuple[str, ...] = IDEAS[:3],
    each: tuple[str, ...] | None = None,
) -> Callable[[Callable], Callable]:
    """Run a test of one `case` over every spec, backend, dtype and variation; a test item takes all variations.

    The sample of `make test`: each spec (or the specs `each`) on each backend with one variation and one dtype that
    rotate, and the specs `also`, in the first dtype, with every variation. The rest is marked `full`.
    """
    items = []
    for s, spec in enumerate(SPECS):
        for b, backend in enumerate(BACKEND_NAMES):
            for t, dtype in enumerate(dtypes):
                marks = () if spec.text in also and t == 0 else (pytest.mark.full,)
                items.append(
                    pytest.param(spec, backend, dtype, variations, marks=marks, id=f"{spec}-{backend}-{dtype}")
                )
            turn, dtype = variations[(s + 5 * b) % len(variations)], dtypes[(s + b) % len(dtypes)]
            if spec.text not in also and (each is None or spec.text in each):
                items.append(pytest.param(spec, backend, dtype, [turn], id=f"{spec}-{backend}-{dtype}-one"))

    def over_all(test: Callable) -> Callable:
        @functools.wraps(test)
        def run_all(self: object, spec: AttentionSpec, variations: list[dict], **rest: object) -> None:
            wrong = []
            for variation in variations:
                case = Case(spec, **variation)
                try:
                    test(self, case=case, **rest)
                except Exception as error:
                    wrong.append(f"{case}: {type(error).__name__}: {error}")
                    trace = error
            if wrong:
                raise AssertionError("\n".join([f"{len(wrong)} of {len(variations)} cases:", *wrong])) from trace

        given = [p for name, p in inspect.signature(test).parameters.items() if name != "case"]
        new = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in ("spec", "variations")]
        run_all.__signature__ = inspect.Signature([*given, *new])  # type: ignore[attr-defined]
        return pytest.mark.parametrize(("spec", "backend", "dtype", "variations"), items)(run_all)

    return over_all


def same(result: Result, other: Result) -> None:
    """Bit-equal and finite, output and gradients."""
    for (name, x), (_, y) in zip(result.items(), other.items(), strict=True):
        assert x.isfinite().all(), f"{name} is not finite"
        assert torch.equal(x, y), f"{name} differs by {(x - y).abs().max():.1e}"
