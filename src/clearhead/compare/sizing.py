"""From measured costs to the size of a comparison that ends in time: pure functions, no clock and no torch.

A comparison's time is modelled from what a run is made of,

    run(n) = start + n step + evaluations(n) evaluation + checkpoints(n) checkpoint + test

with the seconds of each part measured beside the other workers (`clearhead.compare.budget`). The runs go to the workers
in the order in which `clearhead.compare.run` hands them out, each to the one that is free first; tuning, the runs that
count, and the check of verdicts at one learning rate follow each other.

The rule: sizes stand on a ladder on which seeds and steps only grow, and the furthest rung is taken below which every
rung ends in time, the reserve and every run that might become necessary included. More time never gives a smaller
comparison.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from clearhead.compare import probe

RESERVE = 0.15
"""Share of the estimate that is kept free: machines are not steady."""
REPORT_SECONDS = 6.0
"""Reading the runs and writing the report."""
LEAST_SEEDS, SEEDS, MANY_SEEDS, MOST_SEEDS = 3, 5, 8, 12
LEAST_SHARE, SHORT_SHARE, MOST_SHARE = 1 / 16, 1 / 4, 10
"""Of the preset's steps: the fewest, those up to which seeds stay at the fewest, and the most."""
LEAST_STEPS = 10
GROWTH = 1.05
"""From rung to rung, of the steps."""


@dataclass(frozen=True)
class ArmCosts:
    """Seconds of one arm's parts, on one worker beside the others."""

    start: float
    """From the start of the process to the first step, and from the last score to its end."""
    step: float
    evaluation: float
    checkpoint: float
    test: float


@dataclass(frozen=True)
class Schedule:
    """When a run of a given number of steps is scored and saved."""

    steps: int
    """Of the plan before it was sized."""
    eval_every: int
    moves: bool
    """Whether `eval_every` moves with the steps."""
    checkpoint_every: int
    before_first: bool
    """Whether the model is scored before its first step too, as pretrained ones are."""

    def evaluations(self, steps: int) -> int:
        """How often validation is scored."""
        every = max(1, int(self.eval_every * (steps / self.steps))) if self.moves else self.eval_every
        return _times(steps, every) + self.before_first

    def checkpoints(self, steps: int) -> int:
        """How often the run is saved."""
        return _times(steps, self.checkpoint_every)


def _times(steps: int, every: int) -> int:
    """Every so many steps, and after the last."""
    return -(-steps // every) if every else 1


@dataclass(frozen=True)
class Size:
    """A rung: seeds of each arm, and steps of a run of the baseline."""

    seeds: int
    steps: int


@dataclass(frozen=True)
class Work:
    """What is to be carried out at any size; arms in the plan's order, by name."""

    costs: Mapping[str, ArmCosts]
    tokens_per_step: Mapping[str, int]
    baseline: str
    schedule: Schedule
    rates: int = 0
    """Learning rates of the grid; 0 = no grid."""
    tuning_seeds: int = 0
    workers: int = 1

    def steps_of(self, arm: str, steps: int) -> int:
        """An arm's steps: equal tokens for all."""
        return max(1, round(steps * self.tokens_per_step[self.baseline] / self.tokens_per_step[arm]))

    def run(self, arm: str, steps: int) -> float:
        """Seconds of one run of an arm."""
        cost, own = self.costs[arm], self.steps_of(arm, steps)
        return (
            cost.start
            + own * cost.step
            + self.schedule.evaluations(own) * cost.evaluation
            + self.schedule.checkpoints(own) * cost.checkpoint
            + cost.test
        )

    def expected(self, size: Size) -> float:
        """Seconds of the comparison: the speed probe, tuning, the runs that count, the report."""
        runs = {arm: self.run(arm, size.steps) for arm in self.costs}
        untested = {arm: seconds - self.costs[arm].test for arm, seconds in runs.items()}
        tuning = [untested[arm] for _ in range(self.tuning_seeds * self.rates) for arm in self.costs]
        counted = [runs[arm] for _ in range(size.seeds) for arm in self.costs]
        return self._probe() + makespan(tuning, self.workers) + makespan(counted, self.workers) + REPORT_SECONDS

    def most(self, size: Size) -> float:
        """Seconds that it may take: every verdict of a grid has to be checked at one rate, and the reserve."""
        runs = {arm: self.run(arm, size.steps) for arm in self.costs}
        checks = [
            max(runs[arm], runs[self.baseline])
            for arm in self.costs
            if arm != self.baseline and self.rates
            for _ in range(size.seeds)
        ]
        return (self.expected(size) + makespan(checks, self.workers)) * (1 + RESERVE)

    def _probe(self) -> float:
        turn = sum(cost.step for cost in self.costs.values())
        least = probe.WARM_UP + probe.LEAST_ROUNDS
        rounds = min(probe.WARM_UP + probe.ROUNDS, max(least, math.ceil(probe.SECONDS / turn)))
        return max(cost.start for cost in self.costs.values()) + rounds * turn


def makespan(seconds: Sequence[float], workers: int) -> float:
    """Return when the last of these runs ends, each begun in order by the worker that is free first."""
    free = [0.0] * min(workers, max(1, len(seconds)))
    for one in seconds:
        heapq.heappush(free, heapq.heappop(free) + one)
    return max(free)


def ladder(steps: int, *, seeds: int | None = None, least_steps: int = LEAST_STEPS) -> list[Size]:
    """Return the sizes to choose from, of a plan that has `steps` before it is sized.

    Three seeds up to a quarter of the steps; then seeds up to five; then steps up to the plan's; then seeds up to
    eight, where the bootstrap joins; then steps up to ten times the plan's; then seeds up to twelve. With `seeds`
    given, steps alone grow.
    """
    first = max(least_steps, int(steps * LEAST_SHARE))
    short, most = max(first, int(steps * SHORT_SHARE)), max(first, int(steps * MOST_SHARE))
    whole = max(short, steps)
    if seeds is not None:
        return [Size(seeds, n) for n in _grow(first, most)]
    found = [Size(LEAST_SEEDS, n) for n in _grow(first, short)]
    found += [Size(k, short) for k in range(LEAST_SEEDS + 1, SEEDS + 1)]
    found += [Size(SEEDS, n) for n in _grow(short, whole)[1:]]
    found += [Size(k, whole) for k in range(SEEDS + 1, MANY_SEEDS + 1)]
    found += [Size(MANY_SEEDS, n) for n in _grow(whole, most)[1:]]
    return found + [Size(k, most) for k in range(MANY_SEEDS + 1, MOST_SEEDS + 1)]


def _grow(first: int, last: int) -> list[int]:
    found = [first]
    while found[-1] < last:
        found.append(min(last, max(found[-1] + 1, int(found[-1] * GROWTH))))
    return found


def choose(rungs: Sequence[Size], seconds: Callable[[Size], float], left: float) -> Size | None:
    """Return the furthest rung that ends within `left` seconds, as all below it do; None when not even the first."""
    found = None
    for rung in rungs:
        if seconds(rung) > left:
            break
        found = rung
    return found


def to_dict(work: Work) -> dict[str, Any]:
    """Plain values for JSON."""
    return asdict(work) | {"costs": {arm: asdict(cost) for arm, cost in work.costs.items()}}
