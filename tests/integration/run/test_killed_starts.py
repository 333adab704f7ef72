"""A start that was killed after its last artifact: the next one finds all made, and closes what it left running."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.app import app
from flows.run import crashed_runs, session
from flows.run.starts import begin, killed_starts
from flows.tracking.models import tracking_store
from flows.tracking.tracker import Tracker
from tests.support.homes import with_databases
from tests.support.scored_home import finish, graph_of, run_file

GONE = 4_194_304


def kill(home: Path) -> None:
    """Make the last start look like one whose process is gone."""
    path = home / "runs" / "tiny" / "starts" / f"{begin(home, 'tiny').number}.open"
    path.write_text(json.dumps({"host": os.uname().nodename, "pid": GONE, "start": 1}))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What Prefect is asked; a server is not started for it here."""
    asked: list[str] = []

    @contextlib.contextmanager
    def prefect_session(home: Path) -> Iterator[str]:
        asked.append("session")
        yield "http://prefect"

    def mark(name: str) -> int:
        asked.append(f"mark {name}")
        return 1

    monkeypatch.setattr(session, "prefect_session", prefect_session)
    monkeypatch.setattr(crashed_runs, "mark_crashed_runs", mark)
    return asked


def test_the_next_start_closes_the_runs_in_prefect_and_in_mlflow(tmp_path, asked, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file, home = run_file(tmp_path), with_databases(tmp_path / "home")
    graph = graph_of(file, home)
    finish(graph, home)
    dead = Tracker.start(graph, home, file)
    client = dead.writer.client
    assert client.get_run(dead.run_id).info.status == "RUNNING"
    dead.outbox._owned.release()
    kill(home)
    assert [start.number for start in killed_starts(home, "tiny")] == [1]
    for _ in range(2):
        done = CliRunner().invoke(app, ["run", str(file), "--home", str(home)])
        assert done.exit_code == 0, done.output
    # The second one has nothing to close.
    assert asked == ["session", "mark tiny"] and killed_starts(home, "tiny") == []
    with tracking_store(dead.writer.uri):
        assert client.get_run(dead.run_id).info.status == "KILLED"


def test_what_a_killed_start_could_not_send_is_sent_and_its_run_closed_at_once(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    file, home = run_file(tmp_path), with_databases(tmp_path / "home")
    graph = graph_of(file, home)
    dead = Tracker.start(graph, home, file)
    (kept := dead.outbox.path).write_text(
        json.dumps({"ids": dead.outbox.ids})
        + "\n"
        + json.dumps({"op": "tag", "ref": "run", "name": "a", "value": "x"})
        + "\n"
    )
    dead.outbox._owned.release()
    later = Tracker.start(graph, home, file)
    run = dead.writer.client.get_run(dead.run_id)
    assert run.data.tags["a"] == "x" and run.info.status == "KILLED" and not kept.exists()
    assert later.writer.client.get_run(later.run_id).info.status == "RUNNING"
    later.finish("FINISHED", None, None)
