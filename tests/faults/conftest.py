from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.faults import commands
from tests.faults.child import forked

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]  # forks, audit hooks, /proc


@pytest.fixture(scope="session")
def stage(tmp_path_factory):
    """The tiny jobs with what they give when nobody touches them; see `kills.Stage`."""
    from tests.faults.kills import Stage

    return Stage(tmp_path_factory.mktemp("stage"))


@pytest.fixture(scope="session")
def text(stage) -> Path:
    return stage.text


@pytest.fixture(scope="session")
def data(stage) -> Path:
    """A data folder in which the text is prepared already."""
    assert forked(commands.train(stage.text, stage.place / "prepares", stage.data)).code == 0
    return stage.data


@pytest.fixture(scope="session")
def whole(text, data, tmp_path_factory):
    """What the tiny training leaves when nobody touches it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert forked(commands.train(text, run, data)).code == 0
    return commands.trained(run)
