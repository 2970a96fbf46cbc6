"""Thousands of made-up comparisons, counted. A job is a thousand or so of one case; jobs are independent and seeded."""

from __future__ import annotations

import math
import time
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from clearhead.compare import statistics as st
from clearhead.compare.verdict import Verdict
from experiments.calibration.judging import RATES, any_called, judge, judge_grid
from experiments.calibration.worlds import ALIKE, LEVEL, OWN, SHARED, UNLIKE

SEEDS = (3, 5, 8, 12)
TUNING_SEEDS = 2
PROMISED, POWER = 0.05, 0.8
"""What is promised: of equal arms at most, and of planted effects."""
AGAIN, AGAIN_PARTS = 100, 4
"""Number of the first part of the fresh draws, and how many parts there are."""
CURVATURES = (0.3, 0.7, 1.5)
"""Of validation over the learning rate: loss of the neighbouring rate, in standard deviations of a run's own luck."""


@dataclass(frozen=True)
class Case:
    """`kind` of question, and its settings."""

    kind: str
    world: str
    arms: int
    seeds: int


@dataclass(frozen=True)
class Job:
    """Part of a case's comparisons."""

    case: Case
    part: int
    trials: int


def cases() -> list[Case]:
    """Every case of the page."""
    found = [Case("alike", world, 4, seeds) for world in ALIKE for seeds in SEEDS]
    found += [Case("alike", world, arms, 5) for world in ("normal", "skewed", "heavy tails") for arms in (2, 3, 6)]
    found += [Case("unlike", world, 2, seeds) for world in UNLIKE for seeds in SEEDS]
    found += [Case("grid", str(c), arms, seeds) for c in CURVATURES for arms in (2, 4) for seeds in (5, 12)]
    found += [Case("grid", "other optimum", 2, seeds) for seeds in (5, 12)]
    found += [Case("grid power", str(c), 2, seeds) for c in CURVATURES for seeds in (5, 12)]
    found += [Case("power", world, arms, seeds) for world in ("normal",) for arms in (2, 4) for seeds in SEEDS]
    found += [Case("power", world, 2, seeds) for world in ("skewed", "heavy tails", "plateau") for seeds in (5, 12)]
    return found + [Case("bootstrap", world, 2, seeds) for world in ("normal", "skewed") for seeds in (8, 12)]


def jobs(trials: int, parts: int) -> list[Job]:
    """Every case in so many parts; a bootstrap costs more, so fewer of those."""
    return [
        Job(case, part, trials // parts // (4 if case.kind == "bootstrap" else 1))
        for part in range(parts)
        for case in cases()
    ]


def again(rows: Sequence[Mapping[str, Any]], trials: int) -> list[Job]:
    """Fresh draws for the cases of equal arms that stand out: what was picked by its luck is not judged by it."""
    found = [row for row in rows if row["kind"] in ("alike", "grid") and row["rates"]["called"]["low"] > PROMISED]
    found = [row for row in found if row["world"] != "other optimum"]
    return [
        Job(Case(row["kind"], row["world"], row["arms"], row["seeds"]), AGAIN + part, trials)
        for row in found
        for part in range(AGAIN_PARTS)
    ]


def run_one(job: Job) -> dict[str, Any]:
    """Count what the verdicts of a job were."""
    case, began = job.case, time.process_time()
    rng = np.random.default_rng([job.part, case.arms, case.seeds, zlib.crc32(f"{case.kind} {case.world}".encode())])
    counts: Counter[str] = Counter()
    for _ in range(job.trials):
        counts.update(KINDS[case.kind](case, rng))
    return {
        "kind": case.kind,
        "world": case.world,
        "arms": case.arms,
        "seeds": case.seeds,
        "part": job.part,
        "trials": job.trials,
        "counts": dict(counts),
        "cpu_seconds": time.process_time() - began,
    }


def _alike(case: Case, rng: np.random.Generator) -> Counter[str]:
    """Equal arms: is any called better or worse?"""
    world = ALIKE.get(case.world) or UNLIKE[case.world]
    values_as, diverged_as = world(rng, case.arms, case.seeds)
    found = judge(values_as, diverged_as)
    verdicts = {one.verdict for one in found}
    return Counter(
        called=any_called(found),
        better=Verdict.BETTER in verdicts,
        worse=Verdict.WORSE in verdicts,
        none=verdicts == {Verdict.NO_DIFFERENCE},
    )


def _grid(case: Case, rng: np.random.Generator) -> Counter[str]:
    """Equal arms that choose from a grid; or, with "other optimum", arms as good at different rates."""
    other = case.world == "other optimum"
    curvature = 1.5 if other else float(case.world)
    shift_a = np.array([0.0, 1.0] if other else [0.0] * case.arms)
    return _count_grid(*_draw_grid(case, rng, curvature, shift_a, np.zeros(case.arms)))


def _grid_power(case: Case, rng: np.random.Generator) -> Counter[str]:
    """One arm truly better by what two arms at one rate would show 80 % of the time (the spread being known)."""
    effect = st.detectable_effect(math.sqrt(2.0), case.seeds, comparisons=case.arms - 1)
    assert effect is not None
    return _count_grid(
        *_draw_grid(
            case, rng, float(case.world), np.zeros(case.arms), np.array([0.0, -effect] + [0.0] * (case.arms - 2))
        )
    )


def _draw_grid(
    case: Case, rng: np.random.Generator, curvature: float, shift_a: np.ndarray, effect_a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Values at every rate: the best rate lies in the middle, or `shift_a` steps above it."""
    place_r = np.arange(len(RATES)) - len(RATES) // 2
    mean_ar = curvature * (place_r[None, :] - shift_a[:, None]) ** 2 + effect_a[:, None]

    def runs(seeds: int) -> np.ndarray:
        noise = rng.normal(size=(case.arms, len(RATES), seeds))
        return LEVEL + rng.normal(0, SHARED, seeds) + OWN * (mean_ar[:, :, None] + noise)

    return runs(case.seeds), runs(TUNING_SEEDS)


def _count_grid(values_ars: np.ndarray, tuning_art: np.ndarray) -> Counter[str]:
    found, before, alike = judge_grid(values_ars, tuning_art)
    return Counter(
        called=any_called(found),
        called_before=any_called(before),
        better=found[0].verdict is Verdict.BETTER,
        better_before=before[0].verdict is Verdict.BETTER,
        chose_alike=alike,
    )


def _power(case: Case, rng: np.random.Generator) -> Counter[str]:
    """A comparison of equal arms prints an effect; planted in another one, is it found?

    Beside it the effect that was printed before the uncertainty of the spread was reckoned in, and the one that would
    be printed if the spread were known.
    """
    world = ALIKE[case.world]
    printed = judge(world(rng, case.arms, case.seeds)[0])[0]
    values_as, _ = world(rng, case.arms, case.seeds)
    assert printed.sd is not None
    naive = st.detectable_effect(printed.sd, case.seeds, comparisons=case.arms - 1)
    known = st.detectable_effect(OWN * _spread(case.world), case.seeds, comparisons=case.arms - 1)
    found = {}
    for what, effect in (("printed", printed.detectable), ("naive", naive), ("known", known)):
        assert effect is not None
        planted = values_as.copy()
        planted[1] -= effect
        found[what] = judge(planted)[0].verdict is Verdict.BETTER
    return Counter(found)


def _spread(world: str) -> float:
    """Standard deviation of a difference of two runs, in units of OWN."""
    variance = {"normal": 1.0, "skewed": 1.0, "heavy tails": 2.5 / 0.5, "plateau": 1.0 + 100.0 * 0.3 * 0.7}[world]
    return math.sqrt(2.0 * variance)


def _bootstrap(case: Case, rng: np.random.Generator) -> Counter[str]:
    """Does the bootstrap interval, which stands beside Student's, hold zero?"""
    values_as, _ = ALIKE[case.world](rng, case.arms, case.seeds)
    (one,) = judge(values_as, resamples=999)
    assert one.bootstrap is not None
    assert one.interval is not None
    return Counter(
        misses=not one.bootstrap.low <= 0 <= one.bootstrap.high, students=not one.interval.low <= 0 <= one.interval.high
    )


KINDS = {
    "alike": _alike,
    "unlike": _alike,
    "grid": _grid,
    "grid power": _grid_power,
    "power": _power,
    "bootstrap": _bootstrap,
}


def key_of_job(job: Job) -> tuple[Any, ...]:
    """What a line of the file is known by."""
    case = job.case
    return case.kind, case.world, case.arms, case.seeds, job.part, job.trials


def key_of_run(run: dict[str, Any]) -> tuple[Any, ...]:
    """As `key_of_job`."""
    return tuple(run[key] for key in ("kind", "world", "arms", "seeds", "part", "trials"))
