"""The sizing rule as what it is, a pure function of measured costs: it ends in time, and more time never gives less."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from clearhead.compare import sizing
from clearhead.compare.sizing import ArmCosts, Schedule, Size, Work, choose, ladder, makespan

seconds = some.floats(0.001, 30.0)


@some.composite
def works(draw) -> Work:
    count = draw(some.integers(2, 5))
    names = [f"arm {i}" for i in range(count)]
    parts = {field.name: seconds for field in dataclasses.fields(ArmCosts)} | {"step": some.floats(1e-4, 2.0)}
    rates = draw(some.sampled_from([0, 0, 3]))
    return Work(
        costs={name: ArmCosts(**{part: draw(values) for part, values in parts.items()}) for name in names},
        tokens_per_step={name: draw(some.sampled_from([256, 512, 1024])) for name in names},
        baseline=names[draw(some.integers(0, count - 1))],
        schedule=Schedule(
            steps=draw(some.integers(1, 3000)),
            eval_every=draw(some.integers(0, 500)),
            moves=draw(some.booleans()),
            checkpoint_every=draw(some.integers(0, 500)),
            before_first=draw(some.booleans()),
        ),
        rates=rates,
        tuning_seeds=2 if rates else 0,
        workers=draw(some.integers(1, 5)),
    )


@settings(max_examples=60, deadline=None)
@given(works(), some.one_of(some.none(), some.integers(2, 9)), some.floats(1.0, 2e5), some.floats(1.0, 20.0))
def test_a_size_ends_in_time_and_more_time_never_gives_a_smaller_one(work, seeds, left, more):
    rungs = ladder(work.schedule.steps, seeds=seeds)
    size, larger = choose(rungs, work.most, left), choose(rungs, work.most, left * more)
    if size is None:
        assert work.most(rungs[0]) > left
        return
    assert work.most(size) <= left
    assert work.expected(size) < work.most(size)
    assert larger is not None
    assert larger.seeds >= size.seeds
    assert larger.steps >= size.steps


@settings(max_examples=60, deadline=None)
@given(some.integers(1, 100_000), some.one_of(some.none(), some.integers(2, 20)), some.integers(10, 300))
def test_the_ladder_only_climbs_within_its_bounds(steps, seeds, least):
    rungs = ladder(steps, seeds=seeds, least_steps=least)
    assert all(a.seeds <= b.seeds and a.steps <= b.steps and a != b for a, b in itertools.pairwise(rungs))
    assert rungs[0].steps >= least
    assert rungs[-1].steps == max(rungs[0].steps, sizing.MOST_SHARE * steps)
    if seeds is None:
        assert (rungs[0].seeds, rungs[-1].seeds) == (sizing.LEAST_SEEDS, sizing.MOST_SEEDS)
    else:
        assert {rung.seeds for rung in rungs} == {seeds}


@settings(max_examples=60, deadline=None)
@given(some.lists(seconds, min_size=1, max_size=30), some.integers(1, 6), some.data())
def test_the_makespan_lies_between_its_bounds_and_grows_with_every_run(runs, workers, data):
    span = makespan(runs, workers)
    assert max(max(runs), sum(runs) / workers) <= span * (1 + 1e-12)
    assert span <= sum(runs) * (1 + 1e-12)
    longer = list(runs)
    longer[data.draw(some.integers(0, len(runs) - 1))] += 1.0
    assert makespan(longer, workers) >= span


def test_a_comparison_by_hand():
    cost = ArmCosts(start=2.0, step=0.1, evaluation=1.0, checkpoint=0.5, test=3.0)
    schedule = Schedule(steps=100, eval_every=50, moves=True, checkpoint_every=40, before_first=False)
    work = Work({"a": cost, "b": cost}, {"a": 512, "b": 1024}, "a", schedule, workers=2)
    assert (work.steps_of("a", 100), work.steps_of("b", 100)) == (100, 50)
    assert work.run("a", 100) == pytest.approx(2 + 10 + 2 * 1.0 + 3 * 0.5 + 3)
    assert work.run("b", 100) == pytest.approx(2 + 5 + 2 * 1.0 + 2 * 0.5 + 3)
    probe = 2.0 + 50 * 0.2  # 10 s of rounds that take a step of each arm
    assert work.expected(Size(1, 100)) == pytest.approx(probe + 18.5 + sizing.REPORT_SECONDS)
    assert work.most(Size(1, 100)) == pytest.approx(work.expected(Size(1, 100)) * (1 + sizing.RESERVE))


def test_a_grid_adds_its_tuning_runs_and_room_for_every_check():
    cost = ArmCosts(start=0.0, step=1.0, evaluation=0.0, checkpoint=0.0, test=5.0)
    schedule = Schedule(steps=10, eval_every=5, moves=True, checkpoint_every=0, before_first=False)
    plain = Work({"a": cost, "b": cost}, {"a": 1, "b": 1}, "a", schedule)
    grid = dataclasses.replace(plain, rates=3, tuning_seeds=2)
    size = Size(4, 10)
    assert grid.expected(size) - plain.expected(size) == pytest.approx(2 * 3 * 2 * 10.0)  # the test text is left alone
    assert grid.most(size) / (1 + sizing.RESERVE) - grid.expected(size) == pytest.approx(4 * 15.0)


def test_evaluations_are_counted_as_the_training_loop_makes_them():
    schedule = Schedule(steps=1600, eval_every=200, moves=True, checkpoint_every=400, before_first=False)
    assert [schedule.evaluations(n) for n in (1600, 800, 160)] == [8, 8, 8]
    assert [schedule.checkpoints(n) for n in (1600, 801, 100)] == [4, 3, 1]
    fixed = dataclasses.replace(schedule, moves=False, before_first=True)
    assert [fixed.evaluations(n) for n in (1600, 801, 100)] == [9, 6, 2]
    assert dataclasses.replace(schedule, eval_every=0, moves=False).evaluations(500) == 1
