"""The experiment's cases at a few points each: a wrong formula fails here. The page needs the full run."""

from __future__ import annotations

import dataclasses
import statistics

import pytest
import torch
from experiments.moment_formulas.case import Case, compare, error, percentile, sample_points
from experiments.moment_formulas.figure import Panel, scatter_row
from experiments.moment_formulas.page import fits
from experiments.moment_formulas.run import all_cases, as_json, main

CASES = {case.name: case for case in all_cases()}
POINTS = 3


@pytest.mark.parametrize("name", CASES)
def test_prediction_agrees_with_simulation(name: str) -> None:
    # Generous, for few points and one replica: twice the target of the median, three times that of the 90th percentile.
    case = CASES[name]
    rows = []
    for index, params in enumerate(sample_points(case, POINTS, seed=7)):
        rows += compare(case, params, [torch.Generator().manual_seed(100 + index)])
    for quantity in case.quantities:
        errors = [row.error for row in rows if row.quantity == quantity]
        middle, tail = case.targets.get(quantity, (0.02, 0.05))
        assert statistics.median(errors) < 2 * middle, (quantity, errors)
        assert max(errors) < 3 * tail, (quantity, errors)


def test_a_wrong_formula_would_show() -> None:
    right = CASES["dropout"]
    wrong = dataclasses.replace(right, predict=lambda p: {**right.predict(p), "variance": 1.3 * p["sigma"] ** 2})
    params = {**sample_points(right, 1)[0], "p": 1 / 3, "mu": 1.0}
    errors = {row.quantity: row.error for row in compare(wrong, params, [torch.Generator().manual_seed(0)])}
    assert errors["variance"] > 0.1
    assert errors["mean"] < 0.02


def test_points_are_different_and_on_the_grid() -> None:
    case = CASES["linear"]
    points = sample_points(case, 300, seed=1)
    assert len({tuple(point.values()) for point in points}) == 300
    assert all(point[name] in case.grid[name] for point in points for name in case.grid)
    assert points == sample_points(case, 300, seed=1)
    assert points != sample_points(case, 300, seed=2)
    small = dataclasses.replace(case, grid={"a": (1.0, 2.0), "b": (3.0, 4.0, 5.0)})
    assert len({tuple(point.values()) for point in sample_points(small, 99)}) == 6


def test_the_error_measure() -> None:
    predicted = {"mean": 0.1, "variance": 4.0, "covariance": 0.0, "gradient_variance": 1.0, "gradient_covariance": 0.5}
    assert error("variance", 5.0, predicted) == pytest.approx(0.2)
    assert error("variance", 3.0, predicted) == pytest.approx(0.25)  # relative to the prediction where that is larger
    assert error("covariance", 0.4, predicted) == pytest.approx(0.1)
    assert error("mean", 0.3, predicted) == pytest.approx(0.1)
    assert error("gradient_covariance", 0.6, predicted) == pytest.approx(0.1)


def test_percentiles() -> None:
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([0.0, 10.0], 0.9) == pytest.approx(9.0)


def test_results_and_picture_of_a_small_run() -> None:
    case: Case = CASES["dropout"]
    rows = [
        row
        for params in sample_points(case, 4)
        for row in compare(case, params, [torch.Generator().manual_seed(s) for s in (1, 2)])
    ]
    result = as_json(case, rows, 1.0, 0)
    assert len(result["points"]) == 4
    found = fits([case], {case.name: result})
    assert [fit.quantity for fit in found] == list(case.quantities)
    assert all(fit.points == 4 and fit.noise > 0 for fit in found)
    columns = result["quantities"]["variance"]
    svg = scatter_row([Panel("variance", "p50 < 1 %", columns["predicted"], columns["simulated"], ratio=False)])
    assert svg.count("h0") == 4
    assert "p50 &lt; 1 %" in svg


def test_an_unknown_formula_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--case", "lineer"]) == 2
    message = capsys.readouterr().err
    assert "did you mean 'linear'" in message
    assert message.count("\n") == 1
