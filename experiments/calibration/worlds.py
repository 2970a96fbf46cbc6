"""Made-up runs: what a run ends at, under many kinds of luck. Nothing is trained here.

A run's value is `LEVEL + luck of the seed, shared by all arms + luck of its own`, in bits per byte; the own luck has
the standard deviation `OWN` (or a stated multiple) and mean 0, so equal arms have equal means. Legend: a arms, the
baseline first; s seeds; every world draws values_as, and which runs diverged.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

LEVEL, SHARED, OWN = 2.35, 0.02, 0.01

Drawn = tuple[np.ndarray, np.ndarray]
World = Callable[[np.random.Generator, int, int], Drawn]


def _values(rng: np.random.Generator, noise_as: np.ndarray) -> np.ndarray:
    return LEVEL + rng.normal(0, SHARED, noise_as.shape[1]) + OWN * noise_as


def normal(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Normal luck, alike in all arms: what Student's t supposes."""
    return _all_end(_values(rng, rng.normal(size=(arms, seeds))))


def skewed(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Exponential luck: most runs a little good, some much worse."""
    return _all_end(_values(rng, rng.exponential(size=(arms, seeds)) - 1.0))


def heavy(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Student's t with 2.5 degrees of freedom: no fourth moment, hardly a second."""
    return _all_end(_values(rng, rng.standard_t(2.5, size=(arms, seeds))))


def plateau(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Three runs in ten stay on a plateau ten standard deviations above the rest, whatever the arm."""
    stuck = rng.random((arms, seeds)) < 0.3
    return _all_end(_values(rng, rng.normal(size=(arms, seeds)) + 10.0 * (stuck - 0.3)))


def outlier_seed(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """One seed, the same for all arms, on which every run's own luck is ten times as large."""
    scale = np.ones(seeds)
    scale[rng.integers(seeds)] = 10.0
    return _all_end(_values(rng, rng.normal(size=(arms, seeds)) * scale))


def unequal_spread(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Normal luck, each arm with a spread of its own, from a third of the baseline's to three times it."""
    scale = np.concatenate([[1.0], np.geomspace(1 / 3, 3.0, arms - 1) if arms > 2 else [3.0]])
    return _all_end(_values(rng, rng.normal(size=(arms, seeds)) * scale[:, None]))


def correlated(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """The candidates share most of their luck with each other (correlation 0.8) and none with the baseline."""
    own, common = rng.normal(size=(arms, seeds)), rng.normal(size=seeds)
    noise = np.sqrt(0.2) * own + np.sqrt(0.8) * common
    noise[0] = own[0]
    return _all_end(_values(rng, noise))


def diverging(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Skewed luck; one run in twenty diverges by chance, and so does the worst twentieth."""
    noise = rng.exponential(size=(arms, seeds)) - 1.0
    diverged = (rng.random((arms, seeds)) < 0.05) | (noise > -np.log(0.05) - 1.0)
    return _values(rng, noise), diverged


def identical(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """All arms equal to the last bit: one configuration under several names."""
    return _all_end(_values(rng, np.tile(rng.normal(size=seeds), (arms, 1))))


def skewed_candidates(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Equal means, but the shapes differ: the candidates' luck is exponential and three times the baseline's."""
    noise = 3.0 * (rng.exponential(size=(arms, seeds)) - 1.0)
    noise[0] = rng.normal(size=seeds)
    return _all_end(_values(rng, noise))


def rare_disaster(rng: np.random.Generator, arms: int, seeds: int) -> Drawn:
    """Equal means: the candidates are a little better nine times in ten, and very much worse the tenth time."""
    noise = rng.normal(size=(arms, seeds))
    noise[1:] += np.where(rng.random((arms - 1, seeds)) < 0.1, 18.0, -2.0)
    return _all_end(_values(rng, noise))


def _all_end(values_as: np.ndarray) -> Drawn:
    return values_as, np.zeros(values_as.shape, bool)


ALIKE: dict[str, World] = {
    "normal": normal,
    "skewed": skewed,
    "heavy tails": heavy,
    "plateau": plateau,
    "one outlier seed": outlier_seed,
    "unequal spread": unequal_spread,
    "correlated candidates": correlated,
    "runs diverge": diverging,
    "identical": identical,
}
"""Arms without a difference; the promise is about these."""

UNLIKE: dict[str, World] = {"skewed candidates": skewed_candidates, "rare disaster": rare_disaster}
"""Arms with equal means and different shapes: not an A/A, and beyond what any test of a mean can promise."""
