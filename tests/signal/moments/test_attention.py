"""Attention forward: limits that are known exactly, invariances, and simulation where softmax saturates."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from experiments.moment_formulas.draw import equicorrelated
from hypothesis import given, settings
from hypothesis import strategies as st

from clearhead.errors import UserError
from clearhead.signal.moments.attention import attention
from clearhead.signal.moments.attention_backward import attention_backward
from clearhead.signal.moments.attention_without_values import attention_without_values
from clearhead.signal.moments.published_attention import published_attention, published_attention_backward
from clearhead.signal.moments.scores import TemperatureMoments, bounded_share, query_pairs, rotary_variance
from clearhead.signal.moments.types import GradientMoments, Moments
from clearhead.signal.skeleton import AttentionShape, Matrix
from tests.signal.moments.attention_cases import SMALL, both_ways, ratios, shape

X = Moments.of(1.0, 0.3)


# --- exact limits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_equal_weights_bidirectional(p: float) -> None:
    tokens, r = 20, 0.3
    forward, _ = both_ways(shape(spread=0.0, dropout=p), tokens=tokens)
    # sum_j m_j x_j / n with masks m of mean 1 and variance p / (1 - p)
    extra = p / (1 - p)
    assert forward.mix.variance == pytest.approx(r + (1 - r) / tokens + extra / tokens, rel=1e-4)
    assert forward.mix.covariance == pytest.approx(r + (1 - r) / tokens, rel=1e-4)
    assert forward.stats.entropy == pytest.approx(math.log(tokens), rel=1e-6)
    assert forward.stats.jacobian_gain == pytest.approx(1 / tokens - 1 / tokens**2, rel=1e-4)


def test_equal_weights_causal() -> None:
    tokens, r = 40, 0.3
    forward, back = both_ways(shape(spread=0.0, causal=True), tokens=tokens, r_g=0.4)
    i = np.arange(1, tokens + 1)
    shared = 1 / np.maximum.outer(i, i)
    pairs = (shared.sum() - np.trace(shared)) / (tokens * (tokens - 1))
    assert forward.mix.variance == pytest.approx(r + 0.7 * (1 / i).mean(), rel=5e-3)
    assert forward.mix.covariance == pytest.approx(r + 0.7 * pairs, rel=5e-3)
    assert forward.stats.uniform_entropy == pytest.approx(np.log(i).mean(), rel=5e-3)
    assert back.value_path.variance == pytest.approx((1 / i).mean() + 0.4 * (tokens - 1) * pairs, rel=1e-2)


@pytest.mark.parametrize("sigma", [0.1, 0.245])
@pytest.mark.parametrize("p", [0.0, 1 / 3])
def test_the_published_form_is_the_limit_of_weak_scores(sigma: float, p: float) -> None:
    tokens, d = 300, 100
    q = Matrix(d, 64, sigma**2 / d)
    v = Matrix(d, 64, 1.0 / d)
    single = AttentionShape(1, 1, 64, q, q, v, Matrix(64, d, 1 / 64), False, dropout=p)
    # The published form leaves out the dropout of what tokens share (order r / L): take none of it.
    x = Moments.of(1.0, 0.0)
    ours = attention(x, single, width=d, tokens=tokens)
    theirs = published_attention(x, q, q, v, tokens=tokens, dropout=p)
    assert ours.mix.variance == pytest.approx(theirs.variance, rel=0.01)
    assert ours.mix.covariance == pytest.approx(theirs.covariance, rel=0.01)
    g = GradientMoments.of(1.0, 0.5)
    back = attention_backward(g, ours).value_path
    at_mix = g.scaled(d / 64)
    published = published_attention_backward(at_mix, v, tokens=tokens, dropout=p)
    assert back.variance == pytest.approx(published.variance, rel=0.01)
    assert back.covariance == pytest.approx(published.covariance, rel=0.01)


def test_the_published_form_ends_where_scores_are_strong() -> None:
    q = Matrix(100, 64, 4.0 / 100)
    v = Matrix(100, 64, 1 / 100)
    x = Moments.of(1.0, 0.2)
    single = AttentionShape(1, 1, 64, q, q, v, Matrix(64, 100, 1 / 64), False)
    ours = attention(x, single, width=100, tokens=256).mix
    assert ours.variance < 1.05
    assert published_attention(x, q, q, v, tokens=256).variance > 100 * ours.variance


def test_one_winner_copies_values() -> None:
    forward, back = both_ways(shape(spread=300.0), r=0.3)
    # The winner of 48 keys lies about 2.2 deviations towards the query: one of 64 directions is longer.
    assert forward.mix.variance == pytest.approx(1.0 + 0.7 * (2.2**2 - 1.0) / 64, rel=0.01)
    assert forward.stats.largest_weight > 0.99
    assert forward.stats.jacobian_gain < 0.01
    assert back.value_path.variance > 0.9


def test_one_token() -> None:
    forward, back = both_ways(shape(spread=2.0), tokens=1)
    assert forward.mix.variance == pytest.approx(1.0, rel=1e-6)
    assert forward.stats.entropy == pytest.approx(0.0, abs=1e-9)
    assert back.query_path.variance == pytest.approx(0.0, abs=1e-6)
    assert back.input.variance == pytest.approx(1.0, rel=1e-6)


def test_equal_tokens_stay_equal_and_give_no_score_gradient() -> None:
    forward = attention(Moments.of(1.0, 1.0), shape(r=0.0), width=64, tokens=30)
    assert forward.mix.covariance == pytest.approx(forward.mix.variance, rel=1e-6)
    back = attention_backward(GradientMoments.of(1.0, 0.5), forward)
    assert back.query_path.variance == pytest.approx(0.0, abs=1e-9)
    assert back.key_path.variance == pytest.approx(0.0, abs=1e-9)


def test_without_values_the_limit_of_many_tokens() -> None:
    weak = Matrix(128, 32, 0.05 / 128)
    forward = attention_without_values(Moments.of(2.0, 0.4), weak, weak, tokens=4000)
    assert forward.output.variance == pytest.approx(0.8, rel=0.01)
    assert forward.output.covariance == pytest.approx(0.8, rel=0.01)
    path = attention_backward(GradientMoments.of(1.0, 0.3), forward).value_path
    assert path.variance == pytest.approx(0.3, rel=0.01)
    assert path.correlation == pytest.approx(1.0, abs=0.01)


# --- invariances ------------------------------------------------------------------------------------------------------


def test_grouped_queries_change_nothing_but_matrices() -> None:
    many, few = both_ways(shape(spread=2.0)), both_ways(shape(spread=2.0, kv_heads=1))
    assert few[0].mix == many[0].mix
    assert few[1].input == many[1].input


def test_a_key_bias_is_not_seen_and_a_query_bias_is() -> None:
    plain = shape(spread=2.0)
    with_key = dataclasses.replace(plain, key=dataclasses.replace(plain.key, bias_variance=3.0))
    with_query = dataclasses.replace(plain, query=dataclasses.replace(plain.query, bias_variance=3.0))
    assert both_ways(with_key)[0].stats == both_ways(plain)[0].stats
    assert both_ways(with_query)[0].stats.score_variance > both_ways(plain)[0].stats.score_variance


def test_the_variance_grows_and_entropy_falls_with_the_scores() -> None:
    found = [both_ways(shape(spread=s, causal=True))[0] for s in np.linspace(0.0, 12.0, 25)]
    assert (np.diff([f.mix.variance for f in found]) > 0).all()
    assert (np.diff([f.stats.entropy for f in found]) < 0).all()


@given(
    variance=st.floats(1e-8, 1e8),
    r=st.floats(0.0, 1.0),
    mean=st.floats(-5.0, 5.0),
    r_g=st.floats(0.0, 1.0),
    spec=st.sampled_from(["softmax", "laser", "window:7"]),
    causal=st.booleans(),
    rotary=st.booleans(),
    normed=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_input_gives_moments_that_can_exist(
    variance: float, r: float, mean: float, r_g: float, spec: str, causal: bool, rotary: bool, normed: bool
) -> None:
    base = 10000.0 if rotary else None
    made = shape(causal=causal, spec=spec, rope_base=base, qk_norm=normed)
    forward = attention(Moments.of(variance, r, mean), made, width=64, tokens=24)
    back = attention_backward(GradientMoments.of(1.0, r_g), forward)
    values = [forward.mix.mean, forward.mix.variance, forward.mix.covariance, *back.matrices.values()]
    values += [back.input.variance, back.input.covariance, *dataclasses.astuple(forward.stats)[:6]]
    assert all(math.isfinite(value) for value in values)
    assert forward.mix.covariance <= forward.mix.variance * (1 + 1e-6)
    assert abs(back.input.covariance) <= back.input.variance * (1 + 1e-6)
    assert min(back.matrices.values()) >= 0.0


def test_temperature_on_queries_is_a_stronger_score() -> None:
    hot = both_ways(shape(spread=1.0), temperature=TemperatureMoments(query_mean=2.0))[0]
    assert hot.stats == both_ways(shape(spread=2.0))[0].stats
    louder = both_ways(shape(spread=1.0), temperature=TemperatureMoments(value_mean=2.0))[0]
    assert louder.mix.variance == pytest.approx(4 * both_ways(shape(spread=1.0))[0].mix.variance, rel=1e-9)


# --- simulation -------------------------------------------------------------------------------------------------------

POINTS = [
    {"spread": 1.0, "r": 0.4, "r_g": 0.4},
    {"spread": 2.0, "r": 0.6, "r_g": 0.2, "causal": 1.0},
    {"spread": 4.0, "r": 0.0, "r_g": 0.6},
    {"spread": 4.0, "r": 0.4, "r_g": 0.4, "causal": 1.0, "p": 0.1},
    {"spread": 3.0, "r": 0.2, "r_g": 0.0, "heads": 1.0, "d_k": 64.0},
    {"spread": 4.0, "r": 0.8, "r_g": 0.8, "heads": 8.0, "d_k": 8.0},
]


@pytest.mark.parametrize("point", POINTS, ids=str)
def test_forward_within_10_and_gradient_within_20_per_cent(point: dict[str, float]) -> None:
    found = ratios({**SMALL, **point}, replicas=4)
    for name in ("variance", "covariance"):
        assert found[name] == pytest.approx(1.0, abs=0.1), (name, found)
    for name in ("gradient_variance", "gradient_covariance"):
        assert found[name] == pytest.approx(1.0, abs=0.2), (name, found)
    for name in ("query", "key", "value", "output"):
        assert found[f"{name}_weight_gradient"] == pytest.approx(1.0, abs=0.3), (name, found)


def test_the_part_along_the_query_counts_in_small_heads() -> None:
    # With 4 dimensions a head it is a quarter of the query's gradient.
    found = ratios({**SMALL, "heads": 16.0, "d_k": 4.0, "spread": 1.0, "r": 0.0, "r_g": 0.0}, replicas=3)
    assert found["query_weight_gradient"] == pytest.approx(1.0, abs=0.12)


def test_two_rows_share_what_their_overlap_says() -> None:
    tokens, r = 48, 0.6
    made = shape(spread=3.0, r=r)
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(60):
        x = equicorrelated((4, tokens, 64), 0.0, 1.0, r, generator)
        q, k = ((x @ torch.randn(64, 64, generator=generator)).unflatten(-1, (4, 16)).transpose(1, 2) for _ in range(2))
        a = (q @ k.mT * made.query.variance / 4.0).softmax(-1)
        found.append(float((a.sum(2).square().sum(-1) - a.square().sum((2, 3))).mean()) / tokens / (tokens - 1))
    forward, _ = both_ways(made, tokens=tokens, r=r)
    assert forward.flow.overlap == pytest.approx(sum(found) / len(found), rel=0.1)
    shared = r + (1 - r) * forward.flow.overlap
    assert 0.0 <= forward.mix.covariance - shared < 0.03


@pytest.mark.parametrize(
    "point",
    [
        {"spread": 2.0, "cross": 1.0, "context_r": 0.5, "L_context": 24.0, "r": 0.2, "r_g": 0.5},
        {"spread": 2.0, "group": 4.0, "r": 0.3, "r_g": 0.3, "causal": 1.0},
        {"spread": 2.0, "rotary": 1.0, "r": 0.3, "r_g": 0.3, "causal": 1.0},
        {"spread": 2.0, "qk_norm": 1.0, "r": 0.2, "r_g": 0.3},
    ],
    ids=str,
)
def test_cross_grouped_rotary_and_normed(point: dict[str, float]) -> None:
    found = ratios({**SMALL, **point}, replicas=3)
    for name in ("variance", "covariance"):
        assert found[name] == pytest.approx(1.0, abs=0.12), (name, found)
    for name in found:
        if "gradient" in name:
            assert found[name] == pytest.approx(1.0, abs=0.3), (name, found)


@pytest.mark.full
@pytest.mark.parametrize("spread", [0.5, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("causal", [0.0, 1.0])
@pytest.mark.parametrize("heads", [1.0, 4.0, 8.0])
@pytest.mark.parametrize(("r", "r_g"), [(0.0, 0.0), (0.0, 0.8), (0.4, 0.4), (0.8, 0.0), (0.8, 0.8)])
@pytest.mark.parametrize("tokens", [32.0, 128.0, 512.0])
def test_the_wide_sweep(spread: float, causal: float, heads: float, r: float, r_g: float, tokens: float) -> None:
    point = {"d": 64.0, "d_k": 64.0 / heads, "heads": heads, "L": tokens, "spread": spread, "causal": causal}
    found = ratios({**point, "r": r, "r_g": r_g}, replicas=4)
    # 5 and 10 per cent of room for the simulation's own noise.
    for name in ("variance", "covariance"):
        assert found[name] == pytest.approx(1.0, abs=0.15), (name, found)
    for name in ("gradient_variance", "gradient_covariance"):
        assert found[name] == pytest.approx(1.0, abs=0.3), (name, found)


# --- parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho", [-0.4, 0.0, 0.5, 0.9, 1.0])
def test_query_pairs_have_the_correlation_they_should(rho: float) -> None:
    product, cosine, dot, weights = query_pairs(np.array([rho]), 12.0)
    assert float(weights.sum()) == pytest.approx(1.0)
    assert float((weights * dot).sum()) == pytest.approx(rho, abs=1e-9)
    assert float((weights * product**2).sum()) == pytest.approx(1.0 + 2 * rho**2 / 12, rel=0.03)
    draws = np.random.default_rng(0).standard_normal((2, 40_000, 12))
    second = rho * draws[0] + math.sqrt(1 - rho**2) * draws[1]
    sample = (draws[0] * second).sum(1) / np.linalg.norm(draws[0], axis=1) / np.linalg.norm(second, axis=1)
    assert float((weights * cosine**2).sum()) == pytest.approx(float((sample**2).mean()), rel=0.08, abs=0.005)


def test_rotary_variance_starts_as_the_variance_within_a_row() -> None:
    theta = 10000.0 ** (-2.0 * np.arange(16) / 32)
    kappa = np.cos(np.outer(np.arange(64), theta)).mean(1)
    gaps = np.abs(np.subtract.outer(np.arange(64), np.arange(64)))
    expected = 0.01 * (1.0 - kappa[gaps].mean())
    assert rotary_variance(32, 10000.0, 64, False, 0.01) == pytest.approx(expected, rel=0.3)
    assert rotary_variance(32, 10000.0, 64, False, 9.0) < 9.0 * (1.0 - kappa[gaps].mean())
    assert rotary_variance(32, None, 64, False, 1.0) == 0.0


def test_bounded_scores_count_less() -> None:
    assert bounded_share(1e-4, 16) == pytest.approx(1.0, abs=0.01)
    assert bounded_share(4.0, 16) < bounded_share(4.0, 256) < 1.0
    assert bounded_share(4.0, 100_000) == pytest.approx(1.0, abs=0.01)


def test_a_thousand_layers_are_fast() -> None:
    start = time.process_time()
    for k in range(1000):
        made = shape(causal=True)
        forward = attention(Moments.of(1.0 + 0.01 * k, 0.3), made, width=64, tokens=200)
        attention_backward(GradientMoments.of(1.0, 0.3), forward)
    # The aim is 0.5 s on a quiet core; a busy one is slower.
    assert time.process_time() - start < 2.0


def test_no_torch() -> None:
    code = "import sys, clearhead.signal.moments.attention_backward; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- errors -----------------------------------------------------------------------------------------------------------


def test_errors() -> None:
    made = shape()
    with pytest.raises(ValueError, match="width 32"):
        attention(X, made, width=32, tokens=8)
    with pytest.raises(ValueError, match="at least 1 token"):
        attention(X, made, width=64, tokens=0)
    with pytest.raises(ValueError, match="needs context"):
        attention(X, dataclasses.replace(made, cross=True), width=64, tokens=8)
    with pytest.raises(ValueError, match="cannot share"):
        attention(X, dataclasses.replace(made, kv_heads=3), width=64, tokens=8)
    with pytest.raises(ValueError, match="dropout"):
        attention(X, dataclasses.replace(made, dropout=1.0), width=64, tokens=8)
    with pytest.raises(UserError):
        attention(X, dataclasses.replace(made, spec="sofmax"), width=64, tokens=8)
