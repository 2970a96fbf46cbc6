"""A short seeded version of the kills; `python -m tests.faults.run` tells a hundred."""

from __future__ import annotations

import pytest

from tests.faults.kills import tell
from tests.faults.told import fault


@fault("SIGKILL at a seeded moment of {case}, up to three times", "the same command goes on; the result is bit-equal")
@pytest.mark.parametrize(
    ("room", "numbers"), [("train", (0,)), ("data", (0, 2)), ("compare", (0,))], ids=["train", "data", "compare"]
)
def test_killed_and_gone_on_with(stage, room, numbers):
    for number in numbers:
        story = tell(stage, room, number)
        assert story.kills, "the moment never came"
        assert not story.wrong, story
