"""Attention calls of every sort: a finite and right result, or a refusal in our own words; never another exception."""

from __future__ import annotations

import os
from collections import Counter

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.faults.attention_cases import calls, judge
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
