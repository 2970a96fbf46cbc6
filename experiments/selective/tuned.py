"""Runs at a learning rate of their own: every arm gets the same grid, chosen from on seeds that the verdict never sees.

A part trains `Job`s. First those of the grid, with seeds from `TUNING_SEED` on; then the judged ones, seeds from 0, at
the rate whose tuning runs had the lowest mean of what the part calls `val`; last, judged seeds at another arm's rate,
where a claim between arms of different rates waits for them. All runs of a part stand in one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clearhead.compare.plan import TUNING_SEED
from experiments.running import read_runs, run_missing
from experiments.selective.judge import Claim, judge, wanted

TUNING_SEEDS = 2
Run = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """One run. `setting` is what the part varies beside the arm, such as a dimension; "" where it varies nothing."""

    arm: str
    setting: str
    rate: float
    seed: int
    steps: int

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it this run."""
        return (self.arm, self.setting, self.rate, self.seed, self.steps)

    def record(self, status: str, **found: Any) -> Run:
        """The line that is kept: what was asked, what became of it."""
        asked = dict(zip(("arm", "setting", "rate", "seed", "steps"), self.key, strict=True))
        return asked | {"status": status} | found


def key_of_run(run: Run) -> tuple[Any, ...]:
    """See `Job.key`."""
    return (run["arm"], run["setting"], run["rate"], run["seed"], run["steps"])


@dataclass(frozen=True)
class Plan:
    """The runs of a part."""

    arms: Sequence[str]
    rates: Sequence[float]
    steps: int
    seeds: int
    settings: Sequence[str] = ("",)
    tuned_at: str | None = None
    """The setting whose tuning runs choose for all; None = each for itself."""
    tuning_seeds: int = TUNING_SEEDS

    def tuning_jobs(self) -> list[Job]:
        """The grid; none where there is only one rate."""
        if len(self.rates) == 1:
            return []
        settings = self.settings if self.tuned_at is None else (self.tuned_at,)
        return [
            Job(arm, setting, rate, TUNING_SEED + seed, self.steps)
            for seed in range(self.tuning_seeds)
            for setting in settings
            for rate in self.rates
            for arm in self.arms
        ]

    def chosen(self, runs: Iterable[Run]) -> dict[tuple[str, str], float]:
        """The rate of each arm and setting; the lowest rate where none has all its runs finished."""
        known = {key_of_run(run): run for run in runs}
        found = {}
        for arm in self.arms:
            for setting in self.settings:
                there = setting if self.tuned_at is None else self.tuned_at
                means = {}
                for rate in self.rates:
                    keys = [(arm, there, rate, TUNING_SEED + seed, self.steps) for seed in range(self.tuning_seeds)]
                    values = [known[key]["val"] for key in keys if key in known and known[key]["val"] is not None]
                    means[rate] = sum(values) / len(values) if len(values) == len(keys) else math.inf
                best = min(means, key=lambda rate: (means[rate], rate))
                found[arm, setting] = best
        return found

    def judged_jobs(self, runs: Iterable[Run]) -> list[Job]:
        """The runs that count, once the grid has been run."""
        rates = self.chosen(runs)
        return [
            Job(arm, setting, rates[arm, setting], seed, self.steps)
            for seed in range(self.seeds)
            for setting in self.settings
            for arm in self.arms
        ]

    def judged(self, runs: Sequence[Run]) -> list[Run]:
        """Of all runs, those that count."""
        asked = {job.key for job in self.judged_jobs(runs)}
        return [run for run in runs if key_of_run(run) in asked]

    def again(self, runs: Sequence[Run]) -> list[Run]:
        """Of all runs, those of judged seeds at a rate that another arm chose."""
        rates = self.chosen(runs)
        return [
            run
            for run in runs
            if run["seed"] < self.seeds
            and run["steps"] == self.steps
            and rates.get((run["arm"], run["setting"]), run["rate"]) != run["rate"]
        ]

    def equal_rate_jobs(self, families: Sequence[Sequence[Claim]], runs: Sequence[Run]) -> list[Job]:
        """The runs at one rate that claims wait for; each family of claims has intervals of its own."""
        judged, again = self.judged(runs), self.again(runs)
        asked = [one for claims in families for one in wanted(judge(claims, judged, again))]
        return [
            Job(arm, setting, rate, seed, self.steps)
            for arm, setting, rate in dict.fromkeys(asked)
            for seed in range(self.seeds)
        ]


def run_plan(
    plan: Plan,
    path: Path,
    train: Callable[[Job], Run],
    *,
    workers: int,
    families: Sequence[Sequence[Claim]] = (),
) -> dict[str, Any]:
    """Run what is missing of the grid, then of the judged runs, then what the claims of `families` wait for.

    Returns the judged runs, those again at another rate, and the chosen rates.
    """
    _run(path, plan.tuning_jobs(), train, workers)
    _run(path, plan.judged_jobs(read_runs(path)), train, workers)
    _run(path, plan.equal_rate_jobs(families, read_runs(path)), train, workers)
    runs = read_runs(path)
    rates = [
        {"arm": arm, "setting": setting, "rate": rate, "at_edge": rate in (min(plan.rates), max(plan.rates))}
        for (arm, setting), rate in plan.chosen(runs).items()
    ]
    judged = plan.judged(runs)
    seconds = [run.get("cpu_seconds", 0.0) for run in runs]
    return {
        "runs": judged,
        "again": plan.again(runs),
        "rates": rates,
        "grid": list(plan.rates),
        "steps": plan.steps,
        "seeds": plan.seeds,
        "cpu_seconds": {"all": round(sum(seconds), 1), "a_run": round(sum(seconds) / max(1, len(seconds)), 2)},
    }


def _run(path: Path, jobs: Sequence[Job], train: Callable[[Job], Run], workers: int) -> None:
    done = {key_of_run(run) for run in read_runs(path)}
    if all(job.key in done for job in jobs):  # spares the start of workers that find nothing to do
        return
    run_missing(path, jobs, train, key_of_job=lambda job: job.key, key_of_run=key_of_run, workers=workers)
