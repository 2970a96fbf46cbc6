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
