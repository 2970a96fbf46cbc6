"""The contract: ten rules that every mechanism keeps on every backend and dtype (docs/architecture.md lists them).

One class a rule, parametrised over specs of the grammar x backends x dtypes. `make test` runs a sample in which each
spec meets each backend under each rule; what is marked `full` completes the sweep (`make test-full`). A backend that
refuses a call is asked for its reason, which is checked and recorded; `python -m tests.contract_table` makes the table
of what holds. Uninitialised memory of the package is NaN throughout (rule 8).

Rules 1 to 5 (exactness) are here, 6 to 9 (practice) in `contract_practice.py`. Rule 10 (state dict, patch and unpatch,
save and load are identities) is about modules: it lives with the models' tests.

Runs on a bare GPU machine: needs torch, numpy and pytest only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clearhead.attention.attend import attend
from clearhead.attention.mask import Mask
from clearhead.attention.selective import Temperatures
from clearhead.attention.spec import REGISTRY, AttentionSpec, BigBird, Performer, SelfAdjust, Softmax, Window
from clearhead.memory.cache import KVCache
from tests.contract_cases import DTYPES, MASKS, PLAIN, SPECS, Case, Inputs, Layout, make_inputs, sees_by_hand
from tests.contract_practice import (
    TestRule6LowPrecision,
    TestRule7Compile,
    TestRule8UninitialisedMemory,
    TestRule9Dropout,
)
from tests.contract_tools import (
    TOLERANCE,
    by_hand,
    check,
    error_of,
    is_laser,
    refusal,
    run,
    same,
    sweep,
    true_for,
)

__all__ = ["TestRule6LowPrecision", "TestRule7Compile", "TestRule8UninitialisedMemory", "TestRule9Dropout"]

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture(autouse=True)
def placed(request: pytest.FixtureRequest, record_property: Callable[[str, object], None]) -> None:
    """Say where in the table a test belongs, whatever becomes of it."""
    told = getattr(getattr(request.node, "callspec", None), "params", {})
    where = {name: str(told[name]) for name in ("spec", "backend", "dtype") if name in told}
    record_property("place", {"rule": getattr(request.cls, "rule", 0), **where})


@pytest.fixture
def refused(record_property: Callable[[str, object], None]) -> Callable[..., bool]:
    """Ask whether a backend refuses a call, check that it really does, and record the reason for the table."""

    def ask(inputs: Inputs, backend: str, **more: object) -> bool:
        reason = refusal(inputs, backend, **more)
        record_property("ran" if reason is None else "refused", reason)
        return reason is not None

    return ask


def test_every_term_of_the_grammar_is_here() -> None:
    """A mechanism that registers itself joins the suite."""
    text = "+".join(f"{s.weights}+{s.read}+{s.pattern}+{s.temperature}" for s in SPECS)
    assert all(name in text for name in REGISTRY)
    assert len(set(SPECS)) == len(SPECS) >= 60


@pytest.mark.parametrize("spec", PLAIN, ids=str)
def test_who_refuses_plain_calls(spec: AttentionSpec, device: torch.device) -> None:
    """Nothing hides behind a refusal: reference and tiles (a performer: sums) serve every spec, SDPA every softmax."""
    inputs = make_inputs(Case(spec, "causal"), torch.float32, device)
    sums = isinstance(spec.weights, Performer)
    assert refusal(inputs, "reference") is None
    assert (refusal(inputs, "chunked") is None) == (not sums)
    assert (refusal(inputs, "linear") is None) == sums
    assert (refusal(inputs, "sdpa") is None) == isinstance(spec.weights, Softmax)


# ---- 1 ---------------------------------------------------------------------------------------------------------------

SHAPES = [
    dict(mask="none", n=63, m=63, d=32, e=32),
    dict(mask="causal", n=128, m=128, d=64, e=64, h=4),
    dict(mask="causal", n=200, m=200, d=80, e=80, h=2, g=1, b=1),
    dict(mask="causal", n=1, m=1),
    dict(mask="none", n=7, m=7, d=80, e=80),
    dict(mask="prefix", n=63, m=63, d=64, e=64),
    dict(mask="offset", n=63, m=63),
    dict(mask="window", n=63, m=63, h=4),
    dict(mask="window_both", n=128, m=128),
    dict(mask="right", n=63, m=63, h=4, g=1),
    dict(mask="left", n=63, m=63),
    dict(mask="causal_right", n=128, m=128),
    dict(mask="causal_left", n=63, m=63, d=80, e=80, h=4),
    dict(mask="both_sides", n=7, m=7),
    dict(mask="segments", n=63, m=63),
    dict(mask="causal_segments", n=200, m=200, b=2, h=2, g=1),
    dict(mask="dense", n=63, m=63, h=4),
    dict(mask="dense_keys", n=128, m=128),
    dict(mask="all_of_them", n=63, m=63, bias="alibi"),
    dict(mask="causal", n=144, m=144, bias="alibi", h=4),
    dict(mask="causal", n=63, m=63, bias="alibi:fixed"),
    dict(mask="none", n=63, m=63, bias="dense", h=4),
    dict(mask="causal_left", n=144, m=144, bias="dense_keys"),  # several tiles add to one gradient
    dict(mask="dense", n=63, m=63, bias="dense_batch", h=4),
    dict(mask="causal_right", n=63, m=63, bias="dense:fixed"),
    dict(mask="window", n=200, m=200, b=1, bias="alibi"),
    dict(mask="causal_segments", n=144, m=144, bias="fire"),
    dict(mask="both_sides", n=63, m=63, bias="fire", h=4),
    dict(mask="causal", n=144, m=144, bias="t5", g=1),
    dict(mask="causal_left", n=128, m=128, bias="kerple"),
    dict(mask="none", n=63, m=63, bias="kerple_power"),
]


LEARNED = ("t5", "kerple", "kerple_power", "fire")  # the sample meets each mask with one of these
BY_HAND = [
    pytest.param(mask, bias, marks=() if bias not in LEARNED or LEARNED[place % 4] == bias else (pytest.mark.full,))
    for place, mask in enumerate(MASKS)
    for bias in ("none", "alibi", "dense_keys", *LEARNED)
]
SMALL_PATTERNS = {Window: Window(4), BigBird: BigBird(2, random_blocks=1)}  # that hide something of nine keys


class TestRule1EqualsTheReference:
    """Forward and all gradients equal the float64 reference; the reference equals the formulas and passes gradcheck."""

    rule = 1

    @sweep(SHAPES, ("fp32", "bf16", "fp64", "fp16"))
    def test_equals_reference(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        check(run(inputs, backend), true_for(inputs), TOLERANCE[dtype])

    @pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.full) for part in range(1, 6))])
    @pytest.mark.parametrize(("mask", "bias"), BY_HAND)
    def test_reference_by_hand(self, mask: str, bias: str, part: int, device: torch.device) -> None:
        """Row by row in plain Python, sharing no code with the package. A sixth of the specs at a time."""
        sizes = [(9, 9)] if MASKS[mask].square else [(9, 9), (4, 9), (9, 4)]
        offset = part + list(MASKS).index(mask) + 2 * len(bias)
        for spec in [s for i, s in enumerate(SPECS) if (i + offset) % 6 == 0]:
            small = replace(spec, pattern=SMALL_PATTERNS.get(type(spec.pattern), spec.pattern))
            n, m = sizes[len(small.text) % len(sizes)]
            case = Case(small, mask, bias, n=n, m=m, d=3, e=2, h=2, g=1)
            inputs = make_inputs(case, torch.float64, device)
            expected = by_hand(inputs)
            if expected is None:
                continue  # a mechanism whose formula `by_hand` does not know: its reference is its definition
            try:
                check(run(inputs, "reference"), expected, 1e-11)
            except AssertionError as error:
                raise AssertionError(f"{small.text} {n}x{m}: {error}") from None

    @pytest.mark.parametrize(
        ("spec", "backend"),
        [
            pytest.param(s, backend, id=f"{s.text}-{backend}")
            for s in SPECS
            for backend in ("reference", "linear" if isinstance(s.weights, Performer) else "chunked")
        ],
    )
    def test_gradcheck(self, spec: AttentionSpec, backend: str, device: torch.device) -> None:
        """Numeric differences. Detached extrema are constants by decree, which no difference quotient sees."""
        if isinstance(spec.weights, SelfAdjust) and spec.weights.detach_extrema:
            spec = replace(spec, weights=replace(spec.weights, detach_extrema=False))
        some = [("causal", "alibi"), ("none", "dense_keys"), ("causal_left", "fire"), ("causal", "kerple"),
                ("none", "t5"), ("causal", "kerple_power"), ("causal_left", "alibi")]  # fmt: skip
        mask, bias = some[SPECS.index(spec) % len(some)] if spec in SPECS else some[0]
        bias = "none" if isinstance(spec.weights, Performer) else bias
        inputs = make_inputs(Case(spec, mask, bias, n=4, m=5, d=3, e=2, h=2, g=1), torch.float64, device)
        names = list(inputs.tensors)

        def call(*tensors: Tensor) -> Tensor:
            inputs.tensors.update(zip(names, tensors))
            t = inputs.tensors
            out = attend(t["q"], t["k"], t["v"], spec, backend=backend, **inputs.arguments()).out
            return out * (inputs.d_out != 0)  # without the rows that the normalised forms cannot promise

        assert torch.autograd.gradcheck(call, tuple(inputs.tensors.values()), fast_mode=spec not in PLAIN)


# ---- 2 ---------------------------------------------------------------------------------------------------------------


class TestRule2Causality:
    """An edit of a future token leaves the past unchanged.

    Bit-equal for a mean read. LASER shifts by the largest value of all keys, so its past may move by rounding: 1e-5 in
    fp32, 1e-12 in fp64, one unit in the last place of the output in half precision.
    """

    rule = 2

    @sweep(
        [
            dict(mask="causal"),
            dict(mask="causal", n=24, m=63, h=4),
            dict(mask="causal", n=200, m=200, b=1),
            dict(mask="prefix"),
            dict(mask="window", bias="alibi:fixed"),
            dict(mask="offset", bias="alibi"),
            dict(mask="causal_left", bias="dense_keys"),
            dict(mask="causal_right"),
            dict(mask="causal_segments"),
            dict(mask="causal_segments", bias="fire"),
            dict(mask="causal", bias="t5"),
        ],
        ("fp32", "bf16", "fp64", "fp16"),
    )
    def test_future_edit(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        row = case.n // 2  # this query and the key at its place are the first that are edited
        key = row + case.m - case.n
        inputs.d_out[:, :, row:] = 0.0
        before = run(inputs, backend)
        with torch.no_grad():
            for name, first in {"q": row, "tau_q": row, "k": key, "v": key, "tau_k": key, "tau_v": key}.items():
                x = inputs.tensors.get(name)
                if x is not None and x.shape[2] > 1:
                    x[:, :, first:] = 3.0 * torch.randn(x[:, :, first:].shape).to(x)
        after = run(inputs, backend)

        past, past_after = before.out[:, :, :row], after.out[:, :, :row]
        assert not torch.equal(before.out[:, :, row:], after.out[:, :, row:]), "the edit did nothing"
        if is_laser(case.spec):
            ulp = torch.finfo(DTYPES[dtype]).eps * past.double().abs() if dtype in ("bf16", "fp16") else 0.0
            limit = (1e-12 if dtype == "fp64" else 1e-5) + ulp
            assert ((past.double() - past_after.double()).abs() <= limit).all()
        else:
            assert torch.equal(past, past_after)
        for result in (before, after):  # and no gradient flows from the past to the future
            for name, first in {"q": row, "k": key, "v": key}.items():
                assert (result.grads[name][:, :, first:] == 0.0).all(), f"d {name}"


# ---- 3 ---------------------------------------------------------------------------------------------------------------


def tokens(inputs: Inputs, rows: slice, of: slice = slice(None)) -> tuple[tuple[Tensor, Tensor, Tensor], dict]:
    """Query, key, value and the keyword arguments of `attend` for some tokens of some batch rows."""
    t = inputs.tensors
    q, k, v = (t[name][of, :, rows] for name in "qkv")
    tau = [t[name] if name in t and t[name].shape[2] == 1 else t[name][of, :, rows] if name in t else None
           for name in ("tau_q", "tau_k", "tau_v")]  # fmt: skip
    temperatures = None if inputs.case.spec.temperature is None else Temperatures(*tau)
    return (q, k, v), {"temperatures": temperatures, "bias": inputs.bias()}


class TestRule3CachedDecoding:
    """Token by token and in chunks, with rows of unequal length, decoding equals the full forward."""

    rule = 3
    STEPS = ([1, 1, 1, 34, 5, 1, 1, 1, 1, 1], [1] * 47)  # longer than the specs' window

    @sweep(
        [dict(mask="causal", bias=b, n=47, m=47, h=4) for b in ("none", "alibi:fixed", "fire:fixed")],
        ("fp32", "bf16", "fp64"),
    )
    def test_steps(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device, grad=False)
        if refused(inputs, backend):
            return
        full = run(inputs, backend).out
        for steps in self.STEPS[: 1 if case.bias == "none" else 2]:
            cache = KVCache.allocate(case.b, case.g, case.m, case.d, dtype=DTYPES[dtype], device=device)
            outs, done = [], 0
            for step in steps:
                qkv, arguments = tokens(inputs, slice(done, done + step))
                result = attend(*qkv, case.spec, mask=Mask.causal(), state=cache, backend=backend, **arguments)
                assert result.state is cache
                outs.append(result.out)
                done += step
                assert cache.lengths.tolist() == [done] * case.b
            assert error_of(torch.cat(outs, dim=2), full) <= TOLERANCE[dtype]
            for again in (done - 4, 0):  # taken back, and begun anew
                cache.crop(again) if again else cache.reset()
                qkv, arguments = tokens(inputs, slice(again, again + 3))
                out = attend(*qkv, case.spec, mask=Mask.causal(), state=cache, backend=backend, **arguments).out
                assert error_of(out, full[:, :, again : again + 3]) <= TOLERANCE[dtype]

    @sweep([dict(mask="causal", n=44, m=44, b=3, h=4, bias=f"{b}:fixed") for b in ("alibi", "fire")], ("fp32", "bf16"))
    def test_ragged_rows(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        """Left-padded prefill, decoding, a right-padded chunk, reorder, crop, reset: each row is as if alone."""
        inputs = make_inputs(case, DTYPES[dtype], device, grad=False)
        if refused(inputs, backend):
            return
        cache = KVCache.allocate(case.b, case.g, 46, case.d, dtype=DTYPES[dtype], device=device)
        held: list[list[tuple[int, int]]] = [[] for _ in range(case.b)]  # (batch row, token) that each cache row holds

        def feed(first: int, count: int, starts: list[int], ends: list[int], range_given: bool = True) -> None:
            """Give tokens first..first+count of each batch row, of which row r really has starts[r]..ends[r]."""
            (q, k, v), arguments = tokens(inputs, slice(first, first + count))
            mask = Mask.causal()
            if range_given:
                mask = mask & Mask.key_range(torch.tensor(starts, device=device), torch.tensor(ends, device=device))
                for row in range(case.b):
                    for x in (k, v):
                        x[row, :, : starts[row]], x[row, :, ends[row] :] = float("nan"), float("nan")
            out = attend(q, k, v, case.spec, mask=mask, state=cache, backend=backend, **arguments).out
            for row in range(case.b):
                held[row] += [(row, first + t) for t in range(starts[row], ends[row])]
                alone = self._alone(clean, held[row], ends[row] - starts[row], backend)
                error = error_of(out[row : row + 1, :, starts[row] : ends[row]], alone)
                assert error <= TOLERANCE[dtype], f"row {row} after {len(held[row])} tokens: error {error:.1e}"
            assert cache.lengths.tolist() == [len(row) for row in held]

        clean = make_inputs(case, DTYPES[dtype], device, grad=False)
        feed(0, 25, [0, 9, 20], [25, 25, 25])
        feed(25, 1, [0, 0, 0], [1, 1, 1], range_given=False)
        feed(26, 3, [0, 0, 0], [3, 1, 2])
        index = [1, 0, 0]
        cache.reorder(torch.tensor(index, device=device))
        held = [list(held[i]) for i in index]
        feed(29, 2, [0, 0, 0], [2, 2, 2], range_given=False)
        cache.crop(22)
        held = [row[:22] for row in held]
        feed(31, 1, [0, 0, 0], [1, 1, 1], range_given=False)
        cache.reset(torch.tensor([False, True, False], device=device))
        held[1] = []
        feed(32, 10, [0, 3, 0], [10, 10, 10])
        feed(42, 2, [0, 0, 0], [2, 2, 2], range_given=False)

    @staticmethod
    def _alone(clean: Inputs, held: list[tuple[int, int]], new: int, backend: str) -> Tensor:
        """The last `new` outputs of one row's tokens, as an unpadded batch of one, without a cache."""
        t = clean.tensors
        rows, places = [r for r, _ in held], [p for _, p in held]
        pick = lambda x: x[rows, :, places].transpose(0, 1)[None]  # [1, heads, tokens, .]
        tau = [None if t.get(name) is None else t[name] if t[name].shape[2] == 1 else pick(t[name])
               for name in ("tau_q", "tau_k", "tau_v")]  # fmt: skip
        out = attend(
            pick(t["q"]), pick(t["k"]), pick(t["v"]), clean.case.spec, mask=Mask.causal(), bias=clean.bias(),
            temperatures=None if clean.case.spec.temperature is None else Temperatures(*tau), backend=backend,
        ).out  # fmt: skip
        return out[:, :, out.shape[2] - new :]


# ---- 4 ---------------------------------------------------------------------------------------------------------------


class TestRule4Padding:
    """Padding is invisible: what stands there changes nothing, and the padded run equals the unpadded one."""

    rule = 4

    @sweep(
        [
            dict(mask="right", h=4),
            dict(mask="left", bias="alibi"),
            dict(mask="both_sides", bias="alibi:fixed"),
            dict(mask="causal_left", h=4),
            dict(mask="causal_right", bias="dense_keys"),
            dict(mask="segments"),
            dict(mask="causal_segments"),
            dict(mask="dense_keys"),
            dict(mask="right", n=5, m=63),
        ],
        ("fp32", "bf16", "fp64", "fp16"),
    )
    def test_garbage_changes_nothing(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        sees = sees_by_hand(replace(case, spec=AttentionSpec()))  # keys outside a window are no padding
        hidden = ~sees.any(dim=(1, 2)).to(device)  # [b, m]: keys that nobody sees
        empty = ~sees.any(dim=(1, 3)).to(device)  # [b, n]: queries that see nothing
        assert hidden.any()
        before = run(inputs, backend)
        # A temperature multiplies its token before anything else, so its own gradient there would be 0 * NaN.
        worst = [1e4, -1e4] if case.spec.temperature else [float("nan"), float("inf"), -float("inf")]
        with torch.no_grad():
            for name in ("k", "v"):
                x = inputs.tensors[name]
                junk = torch.tensor(worst, device=device, dtype=x.dtype)
                x.copy_(torch.where(hidden[:, None, :, None], junk[torch.arange(x.shape[-1]) % len(worst)], x))
            inputs.tensors["q"].masked_fill_(empty[:, None, :, None], worst[0])
        after = run(inputs, backend)
        for name in ("tau_k", "tau_v"):  # 0 at padding in exact arithmetic: 0 * junk
            after.grads.pop(name, None), before.grads.pop(name, None)
        same(before, after)
        for name in ("k", "v"):
            assert (after.grads[name].transpose(1, 2)[hidden] == 0.0).all()

    @sweep(
        [
            dict(mask="right", h=4),
            dict(mask="left", bias="alibi"),
            dict(mask="both_sides", bias="alibi:fixed"),
            dict(mask="causal_left", h=4, n=128, m=128),
            dict(mask="causal_right"),
            dict(mask="left", bias="fire"),
            dict(mask="causal_left", bias="kerple"),
        ],
        ("fp32", "bf16", "fp64"),
    )
    def test_equals_unpadded(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        layout, kind = Layout(case), MASKS[case.mask]
        keys = ~sees_by_hand(case).any(dim=(1, 2)).logical_not()  # [b, m]: keys that somebody sees
        inputs.d_out *= keys[:, None, :, None].to(inputs.d_out)
        padded = run(inputs, backend)
        for row in range(case.b):
            real = slice(int(keys[row].nonzero()[0]), int(keys[row].nonzero()[-1]) + 1)
            assert (real.start, real.stop) == (
                layout.starts[row] if case.mask in ("left", "both_sides", "causal_left") else 0,
                layout.ends[row] if case.mask.endswith("right") else case.m - (case.mask == "both_sides"),
            )
            alone = make_inputs(case, DTYPES[dtype], device)
            alone.mask = Mask.causal() if kind.causal else Mask()
            alone.d_out = inputs.d_out[row : row + 1, :, real]

            def call(t: dict[str, Tensor], alone: Inputs = alone, row: int = row, real: slice = real) -> Tensor:
                qkv, arguments = tokens(alone, real, slice(row, row + 1))
                return attend(*qkv, case.spec, mask=alone.mask, backend=backend, **arguments).out

            result = run(alone, backend, call=call)
            assert error_of(padded.out[row : row + 1, :, real], result.out) <= TOLERANCE[dtype]
            for name in "qkv":
                error = error_of(padded.grads[name][row], result.grads[name][row])
                assert error <= TOLERANCE[dtype], f"d {name}: {error:.1e}"

    @sweep(
        [
            dict(mask="dense", h=4),
            dict(mask="causal", n=63, m=7),
            dict(mask="causal_left", bias="alibi"),
            dict(mask="segments"),
            dict(mask="right", n=1, m=1),
            dict(mask="all_of_them", bias="dense_batch"),
        ],
        ("fp32", "bf16", "fp64", "fp16"),
    )
    def test_query_that_sees_nothing(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        """Output 0, gradient 0, and whatever gradient arrives there goes nowhere."""
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        empty = ~sees_by_hand(case).any(dim=3).to(device)  # [b, h, n]
        assert empty.any()
        result = run(inputs, backend)
        assert (result.out[empty] == 0.0).all()
        assert (result.grads["q"][empty] == 0.0).all()
        inputs.d_out[empty] = 1e3
        same(result, run(inputs, backend))

    @sweep(
        [
            dict(mask="none", n=5, m=0),
            dict(mask="none", n=0, m=5),
            dict(mask="causal", n=5, m=0),
            dict(mask="causal", n=5, m=0, bias="t5:fixed"),
            dict(mask="causal_left", n=0, m=5, bias="fire"),
        ],
        also=tuple(s.text for s in PLAIN),
    )
    def test_no_keys_and_no_queries(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        result = run(inputs, backend)
        assert result.out.shape == (case.b, case.h, case.n, case.e)
        assert all((x == 0.0).all() for _, x in result.items())


# ---- 5 ---------------------------------------------------------------------------------------------------------------


class TestRule5GroupsAndCross:
    """Grouped queries equal repeated heads; queries and keys may differ in number, keys and values in width."""

    rule = 5

    @sweep(
        [
            dict(mask="causal", h=4, g=2),
            dict(mask="dense", h=6, g=2),
            dict(mask="left", h=4, g=1, bias="alibi"),
            dict(mask="none", h=4, g=1, n=7, m=63),
            dict(mask="causal", h=4, g=2, bias="t5"),
            dict(mask="left", h=4, g=1, bias="fire"),
        ],
        ("fp32", "bf16", "fp64"),
    )
    def test_grouped_equals_repeated(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if refused(inputs, backend):
            return
        times = case.h // case.g

        def repeated(t: dict[str, Tensor]) -> Tensor:
            k, v, tau_k, tau_v = (
                None if t.get(name) is None else t[name].repeat_interleave(times, dim=1)
                for name in ("k", "v", "tau_k", "tau_v")
            )
            temperatures = None if case.spec.temperature is None else Temperatures(t.get("tau_q"), tau_k, tau_v)
            arguments = {**inputs.arguments(), "temperatures": temperatures}
            return attend(t["q"], k, v, case.spec, backend=backend, **arguments).out

        check(run(inputs, backend), run(inputs, backend, call=repeated), TOLERANCE[dtype])

    @sweep(
        [
            dict(mask="none", n=7, m=63, e=80),
            dict(mask="causal", n=7, m=128, d=80, e=32),
            dict(mask="causal", n=63, m=7, e=64),
            dict(mask="right", n=7, m=63, h=4),
            dict(mask="causal_right", n=1, m=63),
            dict(mask="left", n=128, m=63, bias="alibi"),
            dict(mask="window", n=63, m=128),
            dict(mask="dense_keys", n=200, m=7, e=1),
        ],
        ("fp32", "bf16", "fp64", "fp16"),
    )
    def test_cross_attention(
        self, case: Case, backend: str, dtype: str, device: torch.device, refused: Callable[..., bool]
    ) -> None:
        inputs = make_inputs(case, DTYPES[dtype], device)
        if not refused(inputs, backend):
            check(run(inputs, backend), true_for(inputs), TOLERANCE[dtype])
