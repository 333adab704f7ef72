"""What unit tests share."""

from pathlib import Path

import pytest

from flows.run import session
from tests.support.desk import Desk


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    """A desk at which nothing may start a server."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MOPD_HOME", raising=False)
    monkeypatch.setattr(session, "prefect_session", lambda *_: pytest.fail("Prefect was started"))
    return Desk(tmp_path)
