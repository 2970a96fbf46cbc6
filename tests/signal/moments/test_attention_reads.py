"""LASER's read and Self-Adjust's weights: limits and simulation."""

from __future__ import annotations

import dataclasses
import math

import pytest

from clearhead.signal.moments.attention import attention
from clearhead.signal.moments.types import Moments
from tests.signal.moments.attention_cases import SMALL, both_ways, ratios, shape


def quiet(spec: str, spread: float, value: float, causal: bool = False):  # type: ignore[no-untyped-def]
    made = shape(spread=spread, spec=spec, causal=causal)
    return dataclasses.replace(made, value=dataclasses.replace(made.value, variance=value / 64))


@pytest.mark.parametrize("spread", [0.5, 3.0])
@pytest.mark.parametrize("causal", [False, True])
def test_laser_of_quiet_values_is_the_plain_mean(spread: float, causal: bool) -> None:
    laser, back = both_ways(quiet("laser", spread, 1e-4, causal))
    plain, plain_back = both_ways(quiet("softmax", spread, 1e-4, causal))
    assert laser.mix.variance == pytest.approx(plain.mix.variance, rel=0.02)
    assert laser.mix.covariance == pytest.approx(plain.mix.covariance, rel=0.02)
    assert back.value_path.variance == pytest.approx(plain_back.value_path.variance, rel=0.02)
    assert back.query_path.variance == pytest.approx(plain_back.query_path.variance, rel=0.2)
    assert back.key_path.variance == pytest.approx(plain_back.key_path.variance, rel=0.2)


def test_laser_over_equal_weights_lifts_by_half_the_variance() -> None:
    # log mean e^v of many independent v of variance w is w / 2.
    made = quiet("laser", 0.0, 1.0)
    forward = attention(Moments.of(1.0, 0.3), made, width=64, tokens=4000)
    assert forward.mix.mean == pytest.approx(0.35, rel=0.01)
    assert both_ways(made, tokens=1)[0].mix.mean == pytest.approx(0.0, abs=1e-9)


def test_laser_conserves_the_value_gradient() -> None:
    _, back = both_ways(quiet("laser", 2.0, 1.0), tokens=30, r_g=0.4)
    path = back.value_path
    assert 30 * path.variance + 30 * 29 * path.covariance == pytest.approx(30 + 30 * 29 * 0.4, rel=1e-9)


@pytest.mark.parametrize(
    "point",
    [
        {"spread": 1.0, "value_variance": 4.0, "r": 0.2, "r_g": 0.2},
        {"spread": 4.0, "value_variance": 1.0, "r": 0.4, "r_g": 0.4, "causal": 1.0},
    ],
    ids=str,
)
def test_laser_equals_simulation(point: dict[str, float]) -> None:
    found = ratios({**SMALL, **point, "spec": 1.0}, replicas=3)
    assert found["mix_mean"] == pytest.approx(1.0, abs=0.1)
    for name in ("variance", "covariance"):
        assert found[name] == pytest.approx(1.0, abs=0.1), (name, found)
    for name in found:
        if "gradient" in name:
            assert found[name] == pytest.approx(1.0, abs=0.25), (name, found)


@pytest.mark.parametrize("form", ["product", "min_shift", "minmax", "range"])
def test_self_adjust_of_one_token(form: str) -> None:
    forward, _ = both_ways(shape(spec=f"self_adjust:form={form}"), tokens=1)
    # One key: the weight is the score, 0, or with `range` 1 for a positive score and 0 for a negative one.
    expected = {"min_shift": 0.0, "minmax": 0.0, "range": 0.5}
    if form in expected:
        assert forward.mix.variance == pytest.approx(expected[form], abs=0.15)
    assert math.isfinite(forward.mix.variance)


def test_self_adjust_product_of_weak_scores() -> None:
    # w_j = z_j / n: the row sum is the mean score, of variance shared + own / n.
    made = shape(spread=0.05, r=0.5, spec="self_adjust:form=product")
    forward = attention(Moments.of(1.0, 0.5), made, width=64, tokens=32)
    z = forward.setting.scores
    sums = z.shared_variance + z.variance / 32
    squares = (z.shared_variance + z.variance) / 32
    assert forward.flow.sum_square == pytest.approx(sums, rel=0.1)
    assert forward.flow.squares == pytest.approx(squares, rel=0.1)


def test_detached_extrema_change_the_gradient_only() -> None:
    one, back = both_ways(shape(spread=2.0, spec="self_adjust:form=range"))
    two, back_detached = both_ways(shape(spread=2.0, spec="self_adjust:form=range,detach_extrema=true"))
    assert one.mix == two.mix
    assert back_detached.query_path.variance > back.query_path.variance


def test_a_gradient_without_variance_is_named() -> None:
    forward, _ = both_ways(shape(causal=True, spec="self_adjust:form=range,detach_extrema=true"))
    assert any("infinite variance" in note for note in forward.notes)


@pytest.mark.parametrize(
    "point",
    [
        {"spec": 2.0, "spread": 1.0, "r": 0.2, "r_g": 0.2},
        {"spec": 3.0, "spread": 2.0, "r": 0.4, "r_g": 0.4, "causal": 1.0},
        {"spec": 4.0, "spread": 2.0, "r": 0.2, "r_g": 0.6},
        {"spec": 5.0, "spread": 3.0, "r": 0.4, "r_g": 0.2, "causal": 1.0},
    ],
    ids=str,
)
def test_self_adjust_equals_simulation(point: dict[str, float]) -> None:
    found = ratios({**SMALL, **point}, replicas=3)
    for name in ("variance", "covariance"):
        assert found[name] == pytest.approx(1.0, abs=0.2), (name, found)
    assert found["gradient_variance"] == pytest.approx(1.0, abs=0.3), found
    for name in ("query", "key", "value", "output"):
        assert found[f"{name}_weight_gradient"] == pytest.approx(1.0, abs=0.45), (name, found)
