"""The numbers behind a verdict: paired over seeds, corrected for the number of arms, with the power stated.

Everything here is a pure function of numpy arrays. The quantity compared is bits per byte, so **lower is better** and
a negative difference (candidate minus baseline) favours the candidate. A *pair* is the candidate's run and the
baseline's run with the same seed: same data order, same start of every shared parameter. What the intervals cover is
the luck of the seed; the corpus and its split are fixed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats

SPREAD_POINTS = 200
"""Values over which a power is averaged where the spread is an estimate."""
RESAMPLES = 9999
"""Of the bootstrap interval that stands beside Student's."""
BOOTSTRAP_FROM = 8
"""Seeds from which a bootstrap interval is shown beside Student's; below, resampling has too few points to say much."""

# A spike, as the training room counts it (clearhead.train.history).
SPIKE_FACTOR = 10.0
SPIKE_WINDOW = 100
SPIKE_MIN_HISTORY = 10


@dataclass(frozen=True)
class Interval:
    """A two-sided confidence interval and the confidence of this one interval."""

    low: float
    high: float
    confidence: float


@dataclass(frozen=True)
class Tail:
    """How the gradient norm behaved: the middle, the tail, and how often it jumped."""

    median: float
    p99: float
    largest: float
    spikes: int
    steps: int


def bits_per_byte(nats: ArrayLike, n_bytes: ArrayLike) -> float:
    """Return the bits per byte of a set of documents, every document weighted by its bytes.

    `sum(nats) / (ln 2 * sum(bytes))`, which equals the byte-weighted mean of the documents' own bits per byte. It
    compares models with different tokenizers, because the denominator is text and not tokens.
    """
    total = float(np.sum(n_bytes))
    if total <= 0:
        raise ValueError("expected documents with at least one byte, got none; nothing can be scored")
    return float(np.sum(nats)) / (math.log(2.0) * total)


def weighted_mean(values: ArrayLike, weights: ArrayLike) -> float:
    """Return `sum(w x) / sum(w)`; with bits per byte as `x` and bytes as `w` this equals `bits_per_byte`."""
    total = float(np.sum(weights))
    if total <= 0:
        raise ValueError("expected weights with a positive sum, got none")
    return float(np.dot(np.asarray(values, float), np.asarray(weights, float)) / total)


def paired_differences(candidate: Mapping[int, float], baseline: Mapping[int, float]) -> tuple[list[int], np.ndarray]:
    """Return the seeds at which both runs have a finite value, and candidate minus baseline there.

    Pairing removes the part of the seed's luck that both runs share (data order, common initial weights):
    `Var(a - b) = Var(a) + Var(b) - 2 Cov(a, b)`.
    """
    seeds = sorted(
        seed
        for seed in candidate.keys() & baseline.keys()
        if math.isfinite(candidate[seed]) and math.isfinite(baseline[seed])
    )
    return seeds, np.array([candidate[seed] - baseline[seed] for seed in seeds], dtype=float)


def is_constant(differences: np.ndarray) -> bool:
    """Say whether the differences have no spread beyond rounding, in which case Student's t says nothing."""
    d = np.asarray(differences, float)
    return d.size > 0 and float(np.ptp(d)) <= 1e-12 * max(1.0, float(np.abs(d).max()))


def _check_comparisons(comparisons: int) -> None:
    if comparisons < 1:
        raise ValueError(f"expected at least 1 comparison, got {comparisons}")


def student_interval(differences: np.ndarray, *, confidence: float = 0.95, comparisons: int = 1) -> Interval | None:
    """Return Student's interval for the mean difference, simultaneous over `comparisons` arms by Bonferroni.

    `mean ± t(1 - a/2, n - 1) * s / sqrt(n)` with `a = (1 - confidence) / comparisons`. All `comparisons` intervals
    then cover their means together with probability at least `confidence` (Student 1908; Dunn 1961).
    Returns None for fewer than two differences, or differences without spread.
    """
    _check_comparisons(comparisons)
    d = np.asarray(differences, float)
    if d.size < 2 or is_constant(d):
        return None
    own = 1.0 - (1.0 - confidence) / comparisons
    half = float(stats.t.ppf(0.5 + own / 2.0, d.size - 1)) * float(d.std(ddof=1)) / math.sqrt(d.size)
    mean = float(d.mean())
    return Interval(mean - half, mean + half, own)


def student_p_value(differences: np.ndarray) -> float | None:
    """Return the two-sided p value of `mean = 0`: `2 P(T(n-1) > |mean| sqrt(n) / s)`; None where no test exists."""
    d = np.asarray(differences, float)
    if d.size < 2 or is_constant(d):
        return None
    t = float(d.mean()) * math.sqrt(d.size) / float(d.std(ddof=1))
    return float(2.0 * stats.t.sf(abs(t), d.size - 1))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's step-down adjusted p values, in the order given; None stays None and is not counted.

    Sorted ascending, `p~(i) = max over j <= i of min(1, (m - j + 1) p(j))` (Holm 1979). The probability of one or more
    false positives among all arms is then at most the level at which `p~` is read.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[index] = largest
    return adjusted


def bootstrap_interval(
    differences: np.ndarray,
    *,
    confidence: float = 0.95,
    comparisons: int = 1,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval | None:
    """Return the BCa bootstrap interval of the mean difference at the same Bonferroni confidence (Efron 1987).

    Stands beside Student's interval and never replaces it: with this few points it is too narrow: at 8 to 12 seeds it
    missed the mean in 11 to 16 % of made-up comparisons where 5 % is stated (experiments/calibration). Returns
    None below `BOOTSTRAP_FROM` seeds, without spread, or with `resamples=0`.
    """
    _check_comparisons(comparisons)
    d = np.asarray(differences, float)
    if d.size < BOOTSTRAP_FROM or is_constant(d) or resamples == 0:
        return None
    own = 1.0 - (1.0 - confidence) / comparisons
    result = stats.bootstrap(
        (d,),
        np.mean,
        confidence_level=own,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    )
    low, high = float(result.confidence_interval.low), float(result.confidence_interval.high)
    return Interval(low, high, own) if math.isfinite(low) and math.isfinite(high) else None


def power_of_paired_t(effect: float, sd: float, n: int, *, alpha: float = 0.05) -> float:
    """Return the probability that a two-sided paired t test at level `alpha` rejects when the true mean is `effect`.

    With `c = t(1 - alpha/2, n - 1)` and `T'` noncentral t with noncentrality `effect sqrt(n) / sd`:
    `P(T' > c) + P(T' < -c)` (Cohen 1988, chapter 2).
    """
    if n < 2 or sd <= 0:
        raise ValueError(f"expected n >= 2 and sd > 0, got n={n}, sd={sd}")
    return _power(abs(effect) * math.sqrt(n) / sd, n - 1, alpha)


def _power(noncentrality: float, df: int, alpha: float) -> float:
    return alpha if noncentrality == 0.0 else float(_mean_power(np.array([noncentrality]), df, alpha))


def _mean_power(noncentralities: np.ndarray, df: int, alpha: float) -> float:
    """The power at equally likely noncentralities, all above 0."""
    c = float(stats.t.ppf(1.0 - alpha / 2.0, df))
    upper = stats.nct.sf(c, df, noncentralities)
    lower = stats.nct.cdf(-c, df, noncentralities)
    return float(np.mean(upper + np.where(np.isfinite(lower), lower, 0.0)))


def detectable_effect(
    sd: float, n: int, *, alpha: float = 0.05, comparisons: int = 1, power: float = 0.8, sd_df: int | None = None
) -> float | None:
    """Return the smallest true mean difference that `n` pairs find with probability `power`.

    Solves `power_of_paired_t(effect, sd, n, alpha / comparisons) = power` for `effect`: noncentral t, paired design,
    at the Bonferroni level of the report's intervals. `sd` is the standard deviation of the paired differences.

    sd_df: None = `sd` is the true one. A number = `sd` is itself an estimate with so many degrees of freedom (n - 1
        for the run's own seeds), and `power` is that of another comparison of this size averaged over the luck of the
        estimate: with `u = s / sd`, `u^2 ~ chi2(df) / df`, solves `E[power_of_paired_t(effect u, sd, n)] = power`.
        Power is concave where it matters, so taking `s` for the true one would promise too much: an effect printed
        from five seeds would be found 69 % of the time, not 80 (experiments/calibration).

    Returns None when it is not defined (fewer than two pairs, or no spread).
    """
    _check_comparisons(comparisons)
    if not 0.0 < power < 1.0:
        raise ValueError(f"expected 0 < power < 1, got {power}")
    if n < 2 or not sd > 0.0:
        return None
    level = alpha / comparisons
    if level >= power:
        raise ValueError(f"expected a power above the level {level}, got {power}")
    if sd_df is not None and sd_df < 1:
        raise ValueError(f"expected at least 1 degree of freedom of the spread, got {sd_df}")
    return _noncentrality(n - 1, level, power, sd_df) * sd / math.sqrt(n)


@lru_cache(maxsize=256)
def _noncentrality(df: int, alpha: float, power: float, sd_df: int | None = None) -> float:
    """Solve `_power(x, df, alpha) = power` for `x`; with `sd_df`, its mean over the luck of an estimated spread."""
    if sd_df is None:
        lucks = np.ones(1)
    else:  # equally likely values of s / sd
        lucks = np.sqrt(stats.chi2.ppf((np.arange(SPREAD_POINTS) + 0.5) / SPREAD_POINTS, sd_df) / sd_df)

    high = 1.0
    while _mean_power(high * lucks, df, alpha) < power:
        high *= 2.0
    return float(optimize.brentq(lambda x: _mean_power(x * lucks, df, alpha) - power, 1e-9, high, xtol=1e-8))


def first_reach(progress: ArrayLike, values: ArrayLike, target: float) -> float | None:
    """Return the progress (tokens, steps, seconds) at which a falling curve first reaches `target`.

    Linear between the two evaluations around the crossing; None when the curve never gets there.
    """
    x, y = np.asarray(progress, float), np.asarray(values, float)
    below = np.flatnonzero(np.isfinite(y) & (y <= target))
    if below.size == 0:
        return None
    i = int(below[0])
    if i == 0 or not math.isfinite(y[i - 1]) or y[i - 1] == y[i]:
        return float(x[i])
    return float(x[i - 1] + (x[i] - x[i - 1]) * (y[i - 1] - target) / (y[i - 1] - y[i]))


def gradient_tail(norms: ArrayLike, *, factor: float = SPIKE_FACTOR, window: int = SPIKE_WINDOW) -> Tail | None:
    """Return the median, 99th percentile and largest gradient norm (before clipping) and the number of spikes.

    A spike is a step whose norm exceeds `factor` times the median of the `window` norms before it (at least
    `SPIKE_MIN_HISTORY` of them). Non-finite norms are left out: they are counted as skipped steps by the run itself.
    Returns None without any finite norm.
    """
    g = np.asarray(norms, float)
    g = g[np.isfinite(g)]
    if g.size == 0:
        return None
    spikes = sum(bool(g[i] > factor * np.median(g[max(0, i - window) : i])) for i in range(SPIKE_MIN_HISTORY, g.size))
    return Tail(
        median=float(np.median(g)),
        p99=float(np.quantile(g, 0.99)),
        largest=float(g.max()),
        spikes=spikes,
        steps=int(g.size),
    )


def mean_band(curves: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean, the lowest and the highest of equally long curves at every point."""
    stacked = np.stack([np.asarray(curve, float) for curve in curves])
    return stacked.mean(0), stacked.min(0), stacked.max(0)


def student_band(
    curves: Sequence[np.ndarray], *, confidence: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean curve and its pointwise Student interval; with one curve the band has no width."""
    stacked = np.stack([np.asarray(curve, float) for curve in curves])
    mean, n = stacked.mean(0), len(curves)
    if n < 2:
        return mean, mean, mean
    half = float(stats.t.ppf(0.5 + confidence / 2.0, n - 1)) * stacked.std(0, ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half
