from __future__ import annotations

import math

import pytest

from clearhead.train.config import OptimConfig
from clearhead.train.schedule import learning_rate


def rates(total: int, **options) -> list[float]:
    optim = OptimConfig(lr=1.0, **options)
    return [learning_rate(step, total, optim) for step in range(total)]


def test_warmup_rises_linearly_to_the_peak():
    assert rates(20, warmup_steps=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_by_hand():
    got = rates(11, warmup_steps=0, min_lr_fraction=0.2)
    assert got[0] == 1.0
    assert got[5] == pytest.approx(0.6)  # half way between 1 and 0.2
    assert got[10] == pytest.approx(0.2)
    assert got[3] == pytest.approx(0.2 + 0.8 * (1 + math.cos(0.3 * math.pi)) / 2)


def test_wsd_is_flat_then_linear():
    got = rates(10, warmup_steps=2, schedule="wsd", decay_fraction=0.4, min_lr_fraction=0.2)
    assert got == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_decay_stays_clear_of_the_warmup():
    got = rates(10, warmup_steps=5, schedule="wsd", decay_fraction=1.0, min_lr_fraction=0.0)
    assert got == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_constant():
    assert rates(5, warmup_steps=1, schedule="constant") == [1.0] * 5


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("total", [1, 2, 3])
def test_shortest_runs_are_finite(schedule, total):
    got = rates(total, warmup_steps=0, schedule=schedule)
    assert all(0 < rate <= 1 for rate in got)


def test_steps_outside_the_run_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.9, got 10"):
        learning_rate(10, 10, OptimConfig(warmup_steps=0))
