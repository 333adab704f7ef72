"""A password in an address reaches the server it is for and nobody else: no screen, log, page, webhook or `ps`."""

import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

import psutil
import pytest
from rich.console import Console

from base.store.checkpoint import Store
from flows.champion import champion
from flows.cli import doctor, show
from flows.run import pipeline
from flows.run_file.load import load_run_file
from flows.run_file.notify import NotifyConfig
from flows.servers import start as servers
from flows.tracking import tracker as tracking
from tests.support.lineage_home import lab_graph
from tests.support.processes import below, standing
from tests.support.scored_home import run_file

SECRET = "nobody-may-see-this"
AWAY = f"http://me:{SECRET}@127.0.0.1:9"


class Server(BaseHTTPRequestHandler):
    """Answers those alone who know the password; keeps what a webhook is told."""

    heard: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        """Say whether the password was right."""
        known = self.headers["Authorization"] == "Basic bWU6bm9ib2R5LW1heS1zZWUtdGhpcw=="
        self.send_response(200 if known else 401)
        self.end_headers()

    def do_POST(self) -> None:
        """Keep what is said."""
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


@pytest.fixture
def place() -> Iterator[str]:
    """Host and port of a server that wants a password."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "MOPD_"))]:
        monkeypatch.delenv(name)


def test_urls_are_shown_without_what_may_be_a_secret_in_them():
    for url, shown in (
        (f"http://me:{SECRET}@host:5000", "http://host:5000"),
        (f"postgresql+psycopg://me:{SECRET}@host/mlflow", "postgresql+psycopg://host/mlflow"),
        (f"postgresql://host/mlflow?user=me&password={SECRET}", "postgresql://host/mlflow?…"),
        (f"http://me:/{SECRET}@host", "http://host"),
        (f"API request to http://{SECRET}@host/api?token={SECRET} failed", "API request to http://host/api?… failed"),
        ("sqlite:////home/me/mlflow.db", "sqlite:////home/me/mlflow.db"),
        ("http://host/#/experiments/1/runs/2", "http://host/#/experiments/1/runs/2"),
        ("write to me@host", "write to me@host"),
    ):
        assert servers.without_secrets(url) == shown


def test_what_a_person_reads_of_servers_that_answer_and_do_not(clean, tmp_path, place, monkeypatch, capsys):
    screen = io.StringIO()
    for host in (place, "127.0.0.1:9"):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:{SECRET}@{host}")
        monkeypatch.setenv("PREFECT_API_URL", f"http://me:{SECRET}@{host}/api")
        doctor.examine(tmp_path, Console(file=screen, width=300))
        screen.write("\n".join(show.pages(tmp_path, "tiny")))
    for line in (f"{place} answers", "http://127.0.0.1:9 does not answer", f"MLflow:  http://{place}", "9 does not"):
        assert line in screen.getvalue()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    champion.update_aliases(Store(tmp_path), "lab", lab_graph().node("student@0"))
    said = capsys.readouterr()
    assert "MLflow at http://127.0.0.1:9 could not be reached" in said.err
    assert SECRET not in screen.getvalue() + said.out + said.err


@pytest.mark.parametrize(
    ("words", "variable"),
    [
        (["run", "FILE"], "PREFECT_API_URL"),
        (["deploy", "FILE"], "PREFECT_API_URL"),
        (["gc"], "MLFLOW_TRACKING_URI"),
        (["ui"], "MLFLOW_TRACKING_URI"),
    ],
)
def test_what_commands_say_of_a_server_that_is_away(clean, tmp_path, words, variable):
    file = str(run_file(tmp_path))
    (tmp_path / "home" / "store").mkdir(parents=True)
    arguments = [file if word == "FILE" else word for word in words]
    command = [sys.executable, "-m", "flows.cli.entry", *arguments, "--home", str(tmp_path / "home")]
    environment = os.environ | {variable: f"{AWAY}/api" if "API" in variable else AWAY}
    environment |= {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 2 and "http://127.0.0.1:9" in done.stderr, done.stderr
    assert SECRET not in done.stdout + done.stderr


def test_the_database_of_mlflows_server_is_not_on_its_command_line(clean, tmp_path, monkeypatch, caplog, capfd):
    """And what a run leaves in MLflow, when the server's address has a password in it."""
    database = tmp_path / f"{SECRET}.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{database}")
    with standing(servers.start_mlflow, tmp_path, 23800) as server:
        assert database.exists()
        leader = psutil.Process(server.process.pid)
        lines = [" ".join(process.cmdline()) for process in [leader, *below(leader)]]
        assert len(lines) > 1 and not any(SECRET in line for line in lines)

        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("://", f"://me:{SECRET}@"))
        file = tmp_path / "run.yaml"
        file.write_text("name: lab\n")
        tracker = tracking.Tracker.start(lab_graph(), tmp_path / "home", file)
        tracker.finish("FINISHED", None, None)
        assert tracker.url.startswith(f"{server.url}/#/experiments/")
        run = tracker.writer.client.get_run(tracker.run_id)
        assert run.info.status == "FINISHED" and SECRET not in str(run.to_dictionary())
    late = tracking.Tracker.start(lab_graph(), tmp_path / "home", file)
    assert late.outbox.close() > 0 and "does not answer" in caplog.text
    said = capfd.readouterr()
    assert SECRET not in caplog.text + said.out + said.err
    home = [p for p in (tmp_path / "home").rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]
    assert home == []


def test_what_a_webhook_is_told(clean, tmp_path, place, monkeypatch):
    from prefect.settings import PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("HOOK", f"http://{place}")
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "11111111-1111-1111-1111-111111111111")
    config = load_run_file(run_file(tmp_path), []).model_copy(update={"notify": NotifyConfig(webhook_env="HOOK")})
    with (
        temporary_settings({PREFECT_API_URL: f"{AWAY}/api"}),
        pytest.raises(RuntimeError),
        pipeline.notify_on_failure(config),
    ):
        raise RuntimeError(f"API request to {AWAY}/api failed")
    (told,) = Server.heard
    assert told["error"] == "API request to http://127.0.0.1:9/api failed"
    assert told["flow_run"].startswith("http://127.0.0.1:9/runs/flow-run/1111")
    assert SECRET not in json.dumps(told)
