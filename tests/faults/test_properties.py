"""Attention calls of every sort: a finite and right result, or a refusal in our own words; never another exception."""

from __future__ import annotations

import os
from collections import Counter

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from clearhead import functional as F
from tests.faults.attention_cases import DTYPES, LENGTHS, TOLERANCE, calls, judge, ours
from tests.faults.told import fault

MANY = int(os.environ.get("CLEARHEAD_CASES", "10000"))
QUIET = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck), "print_blob": False}


def both(count: Counter[str]) -> None:
    """A test that only ever sees refusals, or none, shows nothing."""
    print(dict(count))
    assert min(count["result"], count["refused"]) > 0.2 * count.total(), count


@fault("{case} attention calls: shapes, dtypes, masks, biases, caches", "the float64 result, or an error of ours")
@pytest.mark.parametrize("cases", [200, pytest.param(MANY, marks=pytest.mark.full, id=f"{MANY}")])
def test_any_call(cases):
    count: Counter[str] = Counter()

    @seed(2026)
    @settings(max_examples=cases, phases=[Phase.generate, Phase.shrink], **QUIET)
    @given(calls())
    def check(call):
        count[judge(call)] += 1

    check()
    both(count)


TWINS = ("softmax", "laser", "self_adjust", "performer", "bigbird")
SHAPES = ("n m", "1 m", "h n m", "1 n m", "b 1 n m", "b h 1 m", "m", "n 1", "n n", "2 2 2 2 2")
KINDS = ("bool", "bool", "0 and -inf", "0 and the least", "numbers", "numbers and -inf", "all -inf", "integers")


@st.composite
def twins(draw):
    return {
        "name": draw(st.sampled_from(TWINS)),
        "sizes": tuple(draw(st.sampled_from(sizes)) for sizes in ((1, 2), (2, 3), LENGTHS, LENGTHS)),
        "shape": draw(st.sampled_from((None, *SHAPES))),
        "kind": draw(st.sampled_from(KINDS)),
        "dtype": draw(st.sampled_from(("fp32", "fp64", "bf16", "fp16"))),
        "causal": draw(st.booleans()),
        "seed": draw(st.integers(0, 1 << 16)),
    }


def mask_like_torchs(case):
    """A mask as `scaled_dot_product_attention` takes it."""
    if case["shape"] is None:
        return None
    gen = torch.Generator().manual_seed(case["seed"])
    b, h, n, m = case["sizes"]
    size = [
        {"b": b, "h": h, "n": n, "m": m}.get(word) or int(word.translate(LETTERS)) for word in case["shape"].split()
    ]
    seen = torch.rand(size, generator=gen) > 0.4
    if case["kind"] == "bool":
        return seen
    if case["kind"] == "integers":
        return seen.long()
    dtype = DTYPES[case["dtype"]]
    values = torch.randn(size, generator=gen) if "numbers" in case["kind"] else torch.zeros(size)
    hidden = torch.finfo(dtype).min if "least" in case["kind"] else float("-inf")
    if case["kind"] == "all -inf":
        return torch.full(size, hidden, dtype=dtype)
    return values.to(dtype) if case["kind"] == "numbers" else values.to(dtype).masked_fill(~seen, hidden)


LETTERS = str.maketrans({letter: "0" for letter in "bhnm"})


@fault("{case} calls of the twins of `scaled_dot_product_attention`, with its masks", "the float64 result, or ours")
@pytest.mark.parametrize("cases", [100, pytest.param(MANY // 10, marks=pytest.mark.full, id=f"{MANY // 10}")])
def test_any_mask_of_a_twin(cases):
    count: Counter[str] = Counter()

    @seed(2026)
    @settings(max_examples=cases, phases=[Phase.generate, Phase.shrink], **QUIET)
    @given(twins())
    def check(case):
        gen = torch.Generator().manual_seed(case["seed"] + 1)
        b, h, n, m = case["sizes"]
        q, k, v = (torch.randn(b, h, x, 4, generator=gen).to(DTYPES[case["dtype"]]) for x in (n, m, m))
        call, mask = getattr(F, f"{case['name']}_attention"), mask_like_torchs(case)
        more = {"features": 8} if case["name"] == "performer" else {}
        try:
            out = call(q, k, v, mask, is_causal=case["causal"], **more)
        except Exception as error:
            if not ours(error):
                raise
            count["refused"] += 1
            return
        assert out.shape == (b, h, n, 4)
        assert out.isfinite().all()
        wide = mask.double() if mask is not None and mask.is_floating_point() else mask
        if mask is not None and mask.is_floating_point() and case["kind"] == "0 and the least":
            wide = wide.masked_fill(mask < -1e4, float("-inf"))  # the least of its own dtype hides, not of float64
        truth = call(q.double(), k.double(), v.double(), wide, is_causal=case["causal"], **more)
        error = (out.double() - truth).norm() / truth.norm().clamp_min(0.1 * max(truth.numel(), 1) ** 0.5)
        assert error <= TOLERANCE[case["dtype"]], f"relative error {error:.2e}"
        count["result"] += 1

    check()
    both(count)
