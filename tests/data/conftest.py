"""Every test of this room has a data folder of its own, and no network."""

from pathlib import Path

import pytest

PLAYS = Path(__file__).parent / "fixtures" / "plays"


@pytest.fixture(autouse=True)
def data_folder(tmp_path, monkeypatch):
    folder = tmp_path / "clearhead-data"
    monkeypatch.setenv("CLEARHEAD_DATA", str(folder))
    return folder


@pytest.fixture
def plays():
    return str(PLAYS)


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that pip takes for its only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    return folder
