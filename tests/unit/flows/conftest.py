"""What the tests of flows share: a run file and a home for runs with made scores."""

from pathlib import Path

import pytest

from tests.support.scored_home import run_file


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return run_file(tmp_path)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"
