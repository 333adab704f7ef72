"""Ports, settings and addresses of the servers, and a process that answers, fails or is ended."""

import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from base.errors import UserError
from flows.servers import pages as mlflow_pages
from flows.servers import start as servers

HOST = "127.0.0.1"


@pytest.fixture
def taken():
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def start(tmp_path: Path, code: str, port: int = 1) -> servers.Server:
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    return servers.Server("Test", process, f"http://{HOST}:{port}", f"http://{HOST}:{port}/", log)


def test_a_named_port_that_is_taken_is_an_error_that_names_it(taken):
    with pytest.raises(UserError, match=f"MLflow: port {taken} on {HOST} is taken"):
        servers.choose_port(HOST, taken, "MLflow", exact=True)


def test_a_default_port_that_is_taken_moves_to_a_free_one(taken):
    chosen = servers.choose_port(HOST, taken, "MLflow")
    assert taken < chosen < taken + servers.PORTS_TRIED
    with socket.socket() as probe:
        # As servers do, which a connection that has just ended does not keep from its port.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, chosen))


def test_the_users_tracking_uri_wins(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert servers.mlflow_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert servers.mlflow_uri(tmp_path) == "http://tracking:5000"
    with pytest.raises(UserError, match="pages of its own"):
        servers.start_mlflow(tmp_path, HOST, 1)


def test_settings_keep_everything_in_the_home_and_no_analytics(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_HOME", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "77")
    settings = servers.prefect_environment(tmp_path)
    assert settings["PREFECT_HOME"] == str(tmp_path / "prefect")
    assert settings["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert int(settings["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"]) > 60
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in servers.mlflow_environment()


def test_a_server_that_ends_early_shows_the_end_of_its_log(tmp_path):
    server = start(tmp_path, "print('no such database'); raise SystemExit(3)")
    with pytest.raises(UserError, match=r"Test ended with code 3:\nno such database"):
        servers.wait_until_ready(server, 240)


def test_a_log_is_shown_from_its_first_error_on(tmp_path):
    log = tmp_path / "log"
    trace = "".join(f"  File {i}\n" for i in range(30))
    log.write_text("welcome\nERROR:    address already in use\nERROR:    Traceback\n" + trace)
    assert servers.tail(log).startswith("ERROR:    address already in use\nERROR:    Traceback\n")
    log.write_text(trace)
    assert servers.tail(log).splitlines() == [f"  File {i}" for i in range(15, 30)]


def test_a_server_is_ready_when_it_answers_and_gone_after_stop(tmp_path):
    port = servers.choose_port(HOST, 23400, "Test")
    child = f"from http.server import *; HTTPServer(('{HOST}', {port}), SimpleHTTPRequestHandler).serve_forever()"
    server = start(tmp_path, f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", port)
    try:
        servers.wait_until_ready(server, 240)
    finally:
        servers.stop([server])
    assert server.process.poll() is not None
    deadline = time.monotonic() + 240
    while servers.choose_port(HOST, port, "Test") != port:
        assert time.monotonic() < deadline, "the server's own child outlived it"
        time.sleep(0.05)


def test_a_server_that_does_not_answer_in_time_is_reported(tmp_path, taken):
    server = start(tmp_path, "import time; print('waiting', flush=True); time.sleep(60)", taken + 1)
    try:
        with pytest.raises(UserError, match="did not answer within 1 s"):
            servers.wait_until_ready(server, 1)
    finally:
        servers.stop([server])


def test_addresses():
    mode = "workflowType=machine_learning"
    assert mlflow_pages.run_page("http://h:1", "2", "r") == f"http://h:1/#/experiments/2/runs/r?{mode}"
    assert mlflow_pages.model_page("2", "m-1") == f"/#/experiments/2/models/m-1?{mode}"
    assert mlflow_pages.version_page("", "a b", "3") == f"/#/models/a%20b/versions/3?{mode}"
    shown = servers.without_secrets(f"see http://me:pw@h:1/#/experiments?{mode} and http://h:1/x?key=1")
    assert shown == f"see http://h:1/#/experiments?{mode} and http://h:1/x?…"
    assert servers.local_url(7, "0.0.0.0") == "http://127.0.0.1:7"
