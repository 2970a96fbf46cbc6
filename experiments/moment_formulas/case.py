"""What one formula's check is made of: a grid, a prediction, a simulation. Imports no torch.

A quantity is named by what it is: `mean`, `variance`, `covariance`, `gradient_variance`, `gradient_covariance`,
`weight_gradient`; a prefix tells two of a kind apart (`gate_gradient_variance`).
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Generator

Params = Mapping[str, float]

TARGETS = (0.02, 0.05)
"""The targets: the median error, and the 90th percentile."""


@dataclass(frozen=True)
class Case:
    """One formula against its simulation."""

    name: str
    grid: Mapping[str, Sequence[float]]
    """Values of each input; points are drawn from the full factorial grid."""
    predict: Callable[[Params], dict[str, float]]
    """The theory: one value per quantity."""
    simulate: Callable[[Params, Generator], dict[str, float]]
    """The same from random draws and autograd. Knows nothing of the formulas. All its randomness is the generator's."""
    quantities: tuple[str, ...]
    """What is compared, in the order of the table. Besides, `predict` must give the variances that errors refer to."""
    note: str = ""
    """What the reader of the page must know: the range, the assumptions, where the formula ends."""
    published: Mapping[str, tuple[float, float, float]] = field(default_factory=dict)
    """p50, p90, p99 in per cent of the authors' own simulations, where they are known."""
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Other (p50, p90) targets than `TARGETS`, by quantity; the note says why. (1, 1): shown, not judged."""
    points: int = 200
    """Grid points of a full run."""


@dataclass(frozen=True)
class Comparison:
    """One quantity at one point."""

    case: str
    quantity: str
    params: Params
    predicted: float
    simulated: float
    error: float
    """See `error`."""
    noise: float
    """The same measure between the mean of the simulation's replicas and its spread: what Monte Carlo itself adds."""


def sample_points(case: Case, count: int, seed: int = 0) -> list[dict[str, float]]:
    """Return `count` different points of the factorial grid, drawn uniformly; the whole grid when it is smaller."""
    names = list(case.grid)
    sizes = [len(case.grid[name]) for name in names]
    total = math.prod(sizes)
    chosen = random.Random(f"{case.name}-{seed}").sample(range(total), min(count, total))
    strides = list(itertools.accumulate(reversed(sizes), lambda product, size: product * size, initial=1))[:-1][::-1]
    return [
        {name: float(case.grid[name][(index // stride) % size]) for name, stride, size in zip(names, strides, sizes)}
        for index in chosen
    ]


def error(quantity: str, actual: float, predicted: Mapping[str, float]) -> float:
    """Return |actual - predicted| / max(|actual|, reference): the relative error, or the one relative to the predicted
    variance where that is smaller (the measure of the authors' own simulations).

    The reference of a covariance is the variance of the same thing, that of a mean the standard deviation (theirs is
    the variance; ours has the unit of a mean). Without it a true covariance of 0 would have an infinite error.
    """
    return abs(actual - predicted[quantity]) / max(abs(actual), _reference(quantity, predicted), 1e-300)


def _reference(quantity: str, predicted: Mapping[str, float]) -> float:
    if quantity.endswith("mean"):
        return math.sqrt(predicted[quantity.removesuffix("mean") + "variance"])
    if quantity.endswith("covariance"):
        own = quantity.removesuffix("covariance") + "variance"
        return predicted[own] if own in predicted else predicted["variance"]
    return abs(predicted[quantity])


def compare(case: Case, params: Params, generators: Sequence[Generator]) -> list[Comparison]:
    """Simulate once per generator, average, and compare with the prediction."""
    predicted = case.predict(params)
    runs = [case.simulate(params, generator) for generator in generators]
    rows = []
    for quantity in case.quantities:
        values = [run[quantity] for run in runs]
        actual = sum(values) / len(values)
        spread = math.sqrt(sum((value - actual) ** 2 for value in values) / max(1, len(values) - 1) / len(values))
        rows.append(
            Comparison(
                case=case.name,
                quantity=quantity,
                params=dict(params),
                predicted=predicted[quantity],
                simulated=actual,
                error=error(quantity, actual, predicted),
                noise=spread / max(abs(actual), _reference(quantity, predicted), 1e-300),
            )
        )
    return rows


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value below which `share` of the values lie, linear between neighbours."""
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
