"""Constants of DeepScaleLM and Admin against worked numbers and against quadrature and simulation of our own."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import integrate

from clearhead.errors import UserError
from clearhead.init import deepscale as ds
from clearhead.init.admin_omega import constant_omega, omegas
from clearhead.init.embedding_correlation import batch_repetition, config_correlation, sinusoid_correlation
from clearhead.models.config import ModelConfig
from clearhead.signal.moments.arc_cosine import relu_raw_correlation

WIDE = 512


def normal_mean(function):
    density = lambda x: function(x) * math.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return integrate.quad(density, -12.0, 12.0, epsabs=1e-13, limit=200)[0]


def gelu(x):
    return 0.5 * x * (1.0 + math.erf(x / math.sqrt(2.0)))


def silu(x):
    return x / (1.0 + math.exp(-x))


def test_the_numbers_of_the_page():
    """docs/initialisation.md, p = 0.1, d = 512. The first V/O, .064461, belongs to r0 = .2209; 0.221 gives .064457."""
    assert ds.embedding_std(0.1, 3) == pytest.approx(0.547723, abs=5e-7)
    assert ds.key_std(WIDE) == ds.query_std(WIDE, 64) == pytest.approx(0.044194, abs=5e-7)
    assert ds.feed_forward_std(WIDE, 4 * WIDE, dropout=0.1) == pytest.approx(0.036197, abs=5e-7)
    assert ds.value_output_std(WIDE, 0.221 * 0.9, 0.1) == pytest.approx(0.064461, rel=1e-4)
    assert ds.logit_multiplier(WIDE, 0.3) == pytest.approx(1.0 / math.sqrt(0.3 * WIDE), rel=1e-12)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("d", [64, 384])
def test_the_constants_to_1e_12(p, d):
    r = 0.37
    assert ds.embedding_std(p, 2) == pytest.approx(math.sqrt((1 - p) / 2), rel=1e-12)
    assert ds.value_output_std(d, r, p) == pytest.approx(math.sqrt(math.sqrt((1 - p) / r) / d), rel=1e-12)
    assert ds.feed_forward_std(d, 4 * d, dropout=p) == pytest.approx(math.sqrt(math.sqrt((1 - p) / 2) / d), rel=1e-12)
    assert ds.simplified_std(d, p) == pytest.approx(math.sqrt(math.sqrt((1 - p) / 2) / d), rel=1e-12)
    # Another hidden size: sigma_1^2 sigma_2^2 = 2 (1 - p) / (d hidden).
    assert ds.feed_forward_std(d, 3 * d, dropout=p) ** 4 == pytest.approx(2 * (1 - p) / (3 * d * d), rel=1e-12)
    for layers, k, alpha in ((24, 2.0, 1.0), (192, 0.96, 1.0), (100, 2.0, 0.5)):
        for counts, depth in (("layers", layers), ("blocks", 2 * layers)):
            c = ds.residual_constants(layers, k, alpha, counts)
            assert c.branch_scale**2 == pytest.approx(k / depth**alpha, rel=1e-12)
            assert c.stream_scale**2 + c.branch_scale**2 == pytest.approx(1.0, rel=1e-12)
    assert ds.residual_constants(10, 2.0, 1.0, "blocks", branches=3).branch_scale ** 2 == pytest.approx(
        2 / 30, rel=1e-12
    )
    assert ds.residual_constants(192, 0.96).stream_scale ** 2 == pytest.approx(0.995, rel=1e-12)  # the code's default


@pytest.mark.parametrize(("p", "gain"), [(0.0, 0.78136), (0.1, 0.744205)])
def test_exact_gelu(p, gain):
    assert WIDE * ds.feed_forward_std(WIDE, 4 * WIDE, "gelu", dropout=p) ** 2 == pytest.approx(gain, abs=5e-6)
    published = ds.feed_forward_std(WIDE, 4 * WIDE, "gelu", dropout=p, constants="published")
    assert published == ds.feed_forward_std(WIDE, 4 * WIDE, "relu", dropout=p)


@pytest.mark.parametrize(("name", "act"), [("relu", lambda x: max(x, 0.0)), ("gelu", gelu), ("silu", silu)])
@pytest.mark.parametrize("gated", [False, True])
def test_every_feed_forward_has_a_branch_of_variance_1(name, act, gated):
    d, hidden, p, inner = 128, 344, 0.1, 0.2
    s = ds.feed_forward_std(d, hidden, name, gated=gated, dropout=p, hidden_dropout=inner)
    second = normal_mean(lambda x: act(math.sqrt(d) * s * x) ** 2) * (d * s * s if gated else 1.0)
    assert hidden * s * s * second / ((1 - p) * (1 - inner)) == pytest.approx(1.0, rel=1e-9)


def test_the_correlation_after_a_feed_forward():
    s = ds.feed_forward_std(WIDE, 4 * WIDE, "silu", gated=True)
    std, r = math.sqrt(WIDE) * s, 0.4
    act = np.vectorize(silu)
    x, y = np.random.default_rng(0).multivariate_normal([0, 0], [[1, r], [r, 1]], 400_000).T * std
    raw = (act(x) * act(y)).mean() / (act(x) ** 2).mean()
    found = ds.feed_forward_correlation(s, WIDE, "silu", gated=True, hidden_dropout=0.25)(r)
    assert found == pytest.approx(0.75 * raw * r, rel=0.02)
    assert ds.feed_forward_correlation(1.0, WIDE)(0.0) == pytest.approx(1 / math.pi)
    assert relu_raw_correlation(1.0) == 1.0


def recursion(n, p, beta2, r0=0.221):
    c = ds.ResidualConstants(math.sqrt(1 - beta2), math.sqrt(beta2))
    layers = [[(p, lambda r: 1.0), (p, relu_raw_correlation)]] * n
    return ds.correlation_recursion(layers, r0, c, embedding_dropout=p)


@pytest.mark.parametrize(
    ("n", "p", "beta2", "last"),
    [(192, 0.1, 2 / 192, 0.789), (1000, 0.1, 2e-3, 0.789), (192, 0.1, 0.005, 0.660), (192, 0.0, 2 / 192, 0.92)],
)
def test_the_correlation_at_the_last_layer(n, p, beta2, last):
    assert recursion(n, p, beta2).output == pytest.approx(last, abs=4e-3)


@pytest.mark.parametrize(("p", "point"), [(0.05, 0.912), (0.1, 0.835), (0.2, 0.700), (0.3, 0.583)])
def test_dropout_caps_the_correlation(p, point):
    assert recursion(20_000, p, 0.001).output == pytest.approx(point, abs=2e-3)


def test_the_recursion_step_by_step():
    found = recursion(1, 0.1, 0.25)
    r = 0.221 * 0.9
    assert found.inputs[0][0] == pytest.approx(r, rel=1e-12)
    r = 0.75 * r + 0.25 * 0.9
    assert found.inputs[0][1] == pytest.approx(r, rel=1e-12)
    assert found.output == pytest.approx(0.75 * r + 0.25 * 0.9 * relu_raw_correlation(r), rel=1e-12)
    assert recursion(1, 0.0, 0.25, r0=1e-6).inputs[0][0] == ds.CORRELATION_FLOOR


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 16)])
def test_the_share_that_attention_leaves(causal, window):
    """Simulated: queries with independent scores of within-row variance 1 - r over values of correlation r."""
    r, tokens, runs = 0.1, 48, 4000
    random = np.random.default_rng(0)
    v = math.sqrt(r) * random.standard_normal((runs, 1)) + math.sqrt(1 - r) * random.standard_normal((runs, tokens))
    scores = math.sqrt(1 - r) * random.standard_normal((runs, tokens, tokens))
    if causal:
        distance = np.arange(tokens)[:, None] - np.arange(tokens)
        hidden = (distance < 0) | (distance >= (window or tokens))
        scores = np.where(hidden, -np.inf, scores)
    weights = np.exp(scores)
    mix = np.einsum("rqk,rk->rq", weights / weights.sum(-1, keepdims=True), v)
    pairs = (mix.sum(1) ** 2 - (mix**2).sum(1)).mean() / (tokens * (tokens - 1))
    share, common = ds.attention_share(r, tokens, causal=causal, window=window)
    assert share == pytest.approx((mix**2).mean(), rel=0.1)  # the ratio of means is 9 % high for few keys
    assert common == pytest.approx(pairs, rel=0.25)
    assert ds.attention_share(r) == (r, r)
    assert ds.attention_share(r, 10**6, causal=causal)[0] == pytest.approx(r, rel=1e-3)
    assert ds.attention_share(r, 1, causal=causal)[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ds.residual_constants(1), r"beta\^2 = k / N\^alpha = 2 / 1\^1 = 2 exceeds 1"),
        (lambda: ds.residual_constants(4, depth_counts="layer"), "did you mean 'layers'"),
        (lambda: ds.feed_forward_std(8, 8, "silu", gated=True, constants="published"), "no gated feed-forward"),
        (lambda: ds.feed_forward_std(8, 8, "gelu", constants="exactly"), "did you mean 'exact'"),
        (lambda: ds.feed_forward_std(8, 8, "gellu"), "did you mean 'gelu'"),
        (lambda: constant_omega(4, "logn"), "did you mean 'log'"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(("n", "value"), [(12, 2.0170), (24, 2.6013), (36, 3.0408), (200, 6.0746), (300, 7.1931)])
def test_admin_torch_constants(n, value):
    assert constant_omega(n) == pytest.approx(value, abs=5e-5)
    assert constant_omega(n) == pytest.approx(math.sqrt((n + 1) / math.log(n + 1) - 1), rel=1e-12)
    assert constant_omega(n, "constant") == math.sqrt(n)
    assert constant_omega(n, "linear") == 1.0


def test_omega_is_an_exclusive_sum():
    assert omegas([0.5, 0.25, 4.0]) == pytest.approx([1.0, math.sqrt(1.5), math.sqrt(1.75)], rel=1e-15)
    assert omegas([0.5, 0.25, 4.0], first_stream=2.0)[1] == pytest.approx(math.sqrt(2.5))


def test_repetition():
    assert batch_repetition([[1, 1, 2, 3], [5, 5, 5, 5]]) == pytest.approx((2 + 12) / 24)
    assert batch_repetition([[1, 1, 9]], [[True, True, False]]) == 1.0
    with pytest.raises(ValueError, match="at least two tokens"):
        batch_repetition([[1, 2]], [[True, False]])


def test_the_first_correlation_of_our_models():
    base = {"vocab_size": 30522, "architecture": "encoder"}
    tokens = config_correlation(ModelConfig(**base, position="rope"))
    assert tokens == pytest.approx(0.0138361, abs=1e-7)
    bert = ModelConfig(**base, position="learned", segment_types=2)
    assert config_correlation(bert) == pytest.approx((tokens + 2 / 3) / 3)  # 0.2268, the paper's 0.221 or so
    assert config_correlation(bert, 0.04, same_segment=1.0) == pytest.approx(1.04 / 3)
    fixed = config_correlation(ModelConfig(position="sinusoidal", width=64, heads=4), 0.04)
    assert fixed == pytest.approx((0.04 + sinusoid_correlation(256, 64)) / 2)


def test_the_correlation_of_sinusoids():
    torch = pytest.importorskip("torch")
    from clearhead.layers.position.sinusoidal import sinusoid

    table = sinusoid(torch.arange(40)[None], 32)[0].double()
    gram = table @ table.T / 16
    pairs = (gram.sum() - gram.diagonal().sum()) / (40 * 39)
    assert sinusoid_correlation(40, 32) == pytest.approx(float(pairs), rel=1e-5)
