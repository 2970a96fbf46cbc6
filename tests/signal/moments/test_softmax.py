"""Softmax over L logits: ours, and the published expansions as its limit."""

from __future__ import annotations

import math

import pytest
from experiments.moment_formulas.attention_simulation import simulate_softmax
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.signal.moments.softmax import (
    published_softmax,
    published_softmax_backward,
    softmax,
    softmax_backward,
)
from clearhead.signal.moments.types import GradientMoments, Moments

G = GradientMoments(1.0, 0.0)


@pytest.mark.parametrize("count", [300, 3000])
@pytest.mark.parametrize("sigma", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("finer", [False, True])
def test_the_published_forms_are_the_limit_of_weak_logits(count: int, sigma: float, finer: bool) -> None:
    logits = Moments.of(sigma**2, 0.3)
    ours, theirs = softmax(logits, count), published_softmax(logits, count, finer=finer)
    assert ours.variance == pytest.approx(theirs.variance, rel=0.02)
    back = softmax_backward(G, logits, count).variance
    assert back == pytest.approx(published_softmax_backward(G, logits, count, finer=finer).variance, rel=0.02)


def test_where_the_published_forms_end() -> None:
    logits, count = Moments.of(9.0, 0.0), 100
    assert published_softmax(logits, count).variance > 3.0 * softmax(logits, count).variance


@pytest.mark.parametrize(("sigma", "count", "r"), [(0.3, 500, 0.5), (1.0, 50, 0.0), (3.0, 100, 0.2), (6.0, 30, 0.0)])
def test_simulation(sigma: float, count: int, r: float) -> None:
    import torch

    found = simulate_softmax(count, sigma, r, 1.0, torch.Generator().manual_seed(0))
    logits = Moments.of(sigma**2, r)
    assert softmax(logits, count).mean == pytest.approx(found["mean"], rel=1e-5)
    assert softmax(logits, count).variance == pytest.approx(found["variance"], rel=0.02)
    assert softmax_backward(G, logits, count).variance == pytest.approx(found["gradient_variance"], rel=0.02)


@given(sigma=st.floats(0.0, 100.0), r=st.floats(0.0, 1.0), count=st.integers(1, 300))
@settings(max_examples=60, deadline=None)
def test_what_holds_for_every_input(sigma: float, r: float, count: int) -> None:
    weights = softmax(Moments.of(sigma**2, r), count)
    assert weights.mean * count == pytest.approx(1.0)
    assert 0.0 <= weights.variance <= 1.0 / count - 1.0 / count**2 + 1e-9
    # The weights of a row sum to 1, the gradients to 0.
    back = softmax_backward(G, Moments.of(sigma**2, r), count)
    for variance, covariance in ((weights.variance, weights.covariance), (back.variance, back.covariance)):
        assert count * variance + count * (count - 1) * covariance == pytest.approx(0.0, abs=1e-12)
    assert 0.0 <= back.variance * count <= 0.25 + 1e-6


def test_what_all_logits_share_is_not_seen() -> None:
    assert softmax(Moments.of(4.0, 0.75), 20) == softmax(Moments.of(1.0, 0.0), 20)
    shared = softmax_backward(GradientMoments(2.0, 1.0), Moments.of(1.0, 0.0), 20)
    assert shared == softmax_backward(G, Moments.of(1.0, 0.0), 20)


def test_one_logit() -> None:
    assert softmax(Moments.of(3.0, 0.0), 1) == Moments(1.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="at least 2"):
        published_softmax(Moments.of(1.0, 0.0), 1, finer=True)
    with pytest.raises(ValueError, match="at least 1"):
        softmax(Moments.of(1.0, 0.0), 0)


def test_the_finer_published_form() -> None:
    t, count = 0.25, 40
    tau = t * count / (count - 1)
    expected = (math.exp(tau) - 1) * math.exp(2 * tau) / ((count - 1) * math.exp(t) + 1) ** 2
    assert published_softmax(Moments.of(0.5, 0.5), count, finer=True).variance == pytest.approx(expected, rel=1e-12)
