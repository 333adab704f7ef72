"""One Prefect server over a home: `mopd ui` uses that of a run under way, and takes its place when the run ends."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from base.errors import UserError
from flows.servers import standing
from flows.servers.start import Server, choose_port, local_url, wait_until_ready
from tests.support.processes import HOST, eventually

ANSWERS = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Answer(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Answer).serve_forever()
"""


class Started:
    """Servers that answer everything, in place of MLflow's and Prefect's."""

    def __init__(self) -> None:
        self.all: list[Server] = []

    def start(self, name: str, home: Path, port: int) -> Server:
        log = home / f"{name}.log"
        command = [sys.executable, "-c", ANSWERS, str(port)]
        process = subprocess.Popen(command, stderr=log.open("wb"), start_new_session=True)
        url = local_url(port)
        self.all.append(Server(name, process, url, url + standing.HEALTH[name.lower()], log))
        return self.all[-1]

    def named(self, name: str) -> list[Server]:
        return [server for server in self.all if server.name == name]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[Started]:
    started = Started()
    monkeypatch.setattr(standing, "start_mlflow", lambda home, host, port: started.start("MLflow", home, port))
    monkeypatch.setattr(standing, "start_prefect", lambda home, host, port: started.start("Prefect", home, port))
    yield started
    for server in started.all:
        server.process.kill()
        server.process.wait()


def test_the_server_of_a_run_under_way_is_used_and_replaced_at_its_address(tmp_path, started, capsys):
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    own = started.start("Prefect", home, choose_port(HOST, 25200, "a test's server"))
    wait_until_ready(own)
    (home / "servers").mkdir()
    ends: list[Exception] = []

    def serve() -> None:
        try:
            standing.ui(home, HOST)
        except UserError as error:
            ends.append(error)

    thread = threading.Thread(target=serve)
    with standing.run_server(home, own):
        thread.start()
        assert eventually(lambda: standing.standing(home, "prefect"), within=60) == own.url
        assert standing.standing(home, "mlflow") == started.named("MLflow")[0].url
        # A run does not rely on a server that ends with another run.
        assert standing.standing(home, "prefect", lasting=True) == ""
        assert started.named("Prefect") == [own]
        with pytest.raises(UserError, match="already"):
            standing.ui(home, HOST)
        own.process.kill()
        own.process.wait()
    assert eventually(lambda: standing.standing(home, "prefect", lasting=True), within=60) == own.url
    second = started.named("Prefect")[1]
    second.process.kill()
    thread.join(timeout=60)
    assert not thread.is_alive() and "Prefect ended with code" in str(ends[0])
    assert standing.standing(home, "prefect") == standing.standing(home, "mlflow") == ""
    said = capsys.readouterr().out
    assert f"Prefect  {own.url}\n" in said and "/#/experiments?workflowType=machine_learning" in said


def test_it_prints_the_pages_of_the_homes_runs(tmp_path, started, capsys):
    from flows.servers.pages import save_pages

    save_pages(tmp_path, "lab", {"run": "/#/r", "champion": "/#/c", "lineage": "/#/l"})
    server = started.start("MLflow", tmp_path, choose_port(HOST, 25300, "a test's server"))
    standing._show_pages(tmp_path, server, "http://prefect")
    said = capsys.readouterr().out
    assert f"lab\n  run:      {server.url}/#/r\n  champion: {server.url}/#/c\n  lineage:  {server.url}/#/l\n" in said


def test_a_broken_record_is_of_no_server(tmp_path):
    (tmp_path / "servers").mkdir()
    for text in ("", "[]", '{"url": 1}', '{"url": "http://x", "pid": "y", "start": 1}'):
        (tmp_path / "servers" / "prefect.json").write_text(text)
        assert standing.standing(tmp_path, "prefect") == ""
