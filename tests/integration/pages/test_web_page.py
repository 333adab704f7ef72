"""A web page open in the user's browser, and a stranger on the machine, against the servers of `mopd ui`.

They send what a browser sends for a page of another origin: preflights, simple requests with a text body, requests
whose Host is a name of their own that leads here (DNS rebinding). The worker runs meanwhile.
"""

import asyncio
import base64
import http.client
import json
import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from tests.integration.run.test_pipeline import RUN
from tests.support.homes import with_databases
from tests.support.processes import eventually

EVIL = "http://attacker.example"
JSON = {"Content-Type": "application/json"}
PREFIXES = ("PREFECT_", "MLFLOW_", "MOPD_")


class Place:
    """A home with its standing servers, a deployment and a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / "run.yaml"
        self.home = with_databases(folder / "home")
        self.file.write_text(yaml.safe_dump(RUN, sort_keys=False))
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(PREFIXES)}
        self.deployment = ""

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.cli.entry", *arguments, "--home", str(self.home)]
        log = (self.folder / f"{arguments[0]}.log").open("wb")
        return subprocess.Popen(
            command, env=self.environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
        )

    def mopd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli.entry", *arguments, "--home", str(self.home)]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=self.folder, check=False, timeout=240
        )

    @property
    def secret(self) -> str:
        path = self.home / "servers" / "prefect.secret"
        return path.read_text().strip() if path.exists() else ""

    @property
    def known(self) -> dict[str, str]:
        """What the user's own browser sends once it was let in."""
        return JSON | {"Authorization": f"Basic {base64.b64encode(self.secret.encode()).decode()}"}

    def url(self, name: str) -> str:
        return str(json.loads((self.home / "servers" / f"{name}.json").read_text())["url"])

    def ask(
        self, name: str, method: str, path: str, headers: Mapping[str, str], body: str = ""
    ) -> tuple[int, dict[str, str], str]:
        """Send one request as it stands; status, headers in lower case and text of the answer."""
        connection = http.client.HTTPConnection(urlsplit(self.url(name)).netloc, timeout=60)
        try:
            connection.putrequest(method, path, skip_host="Host" in headers)
            for key, value in {**headers, "Content-Length": str(len(body.encode()))}.items():
                connection.putheader(key, value)
            connection.endheaders(body.encode())
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode(errors="replace")
        finally:
            connection.close()

    def order(self, mark: Path) -> str:
        """The body that made the worker run a command."""
        variables = {"command": f"touch {mark}", "working_dir": str(self.folder), "env": {"LD_PRELOAD": "/x.so"}}
        return json.dumps({"job_variables": variables, "enforce_parameter_schema": False})

    def runs(self) -> int:
        """How many runs Prefect has."""
        return int(self.ask("prefect", "POST", "/api/flow_runs/count", self.known, "{}")[2])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    place = Place(tmp_path_factory.mktemp("place"))
    started = [place.start("ui")]
    try:
        eventually((place.home / "servers" / "prefect.json").exists, within=600)
        done = place.mopd("deploy", str(place.file))
        assert done.returncode == 0, done.stderr
        place.deployment = re.search(r"deployments/deployment/(\S+)", done.stdout)[1]
        started.append(place.start("worker"))
        yield place
    finally:
        for process in reversed(started):
            process.send_signal(signal.SIGINT)
            process.wait(timeout=240)


def create(place: Place) -> str:
    return f"/api/deployments/{place.deployment}/create_flow_run"


def test_a_browser_gives_no_page_of_another_origin_leave_to_ask(place: Place) -> None:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,authorization"}
    for origin in (EVIL, "null", "http://127.0.0.1:1", "http://localhost", f"{place.url('prefect')}.attacker.example"):
        status, headers, _ = place.ask("prefect", "OPTIONS", create(place), {"Origin": origin, **wanted})
        assert status == 400 and "access-control-allow-origin" not in headers, origin
        _, headers, _ = place.ask("prefect", "GET", "/api/health", {"Origin": origin})
        assert "access-control-allow-origin" not in headers, origin
    own = place.url("prefect")
    for origin in (own, own.replace("127.0.0.1", "localhost")):
        _, headers, _ = place.ask("prefect", "OPTIONS", create(place), {"Origin": origin, **wanted})
        assert headers["access-control-allow-origin"] == origin


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/json", ""])
@pytest.mark.parametrize("host", ["", "attacker.example:4200", "10.attacker.example"])
def test_nobody_without_the_secret_makes_or_reads_anything(place: Place, kind: str, host: str, tmp_path: Path) -> None:
    """Also behind a rebound name, where the page is of the same origin and a browser asks no leave."""
    before = place.runs()
    headers = {"Origin": f"http://{host or 'attacker.example'}"}
    headers |= {"Content-Type": kind} if kind else {}
    headers |= {"Host": host} if host else {}
    body = place.order(tmp_path / "mark")
    for guess in ({}, {"Authorization": "Basic " + base64.b64encode(b"mopd:").decode()}, {"Authorization": "Bearer x"}):
        for path in (create(place), "/api/flow_runs/", "/api/work_pools/", "/api/flow_runs/filter"):
            assert place.ask("prefect", "POST", path, headers | guess, body)[0] == 401, path
        assert place.ask("prefect", "GET", "/api/admin/settings", headers | guess)[0] == 401
    assert place.runs() == before


def test_no_socket_is_open_without_the_secret(place: Place) -> None:
    from websockets.asyncio.client import connect
    from websockets.exceptions import WebSocketException

    address = place.url("prefect").replace("http", "ws") + "/api/events/out"

    async def listen(subprotocols: Any, words: list[Any]) -> str:
        async with connect(address, origin=EVIL, subprotocols=subprotocols, open_timeout=60) as socket:
            for word in words:
                await socket.send(json.dumps(word))
            return str(await socket.recv())

    for subprotocols, words in (
        (None, [{"type": "filter", "filter": {}}]),
        (["prefect"], [{"type": "auth", "token": ""}]),
        (["prefect"], [{"type": "auth", "token": "mopd:guess"}]),
    ):
        with pytest.raises(WebSocketException):
            asyncio.run(listen(subprotocols, words))
    assert "auth_success" in asyncio.run(listen(["prefect"], [{"type": "auth", "token": place.secret}]))


def test_a_run_brings_no_command_folder_or_environment_even_with_the_secret(place: Place, tmp_path: Path) -> None:
    marks = [tmp_path / str(number) for number in range(4)]
    before = place.runs()
    status, _, text = place.ask("prefect", "POST", create(place), place.known, place.order(marks[0]))
    assert status == 422 and "command" in text
    for key, value in (("env", {"A": "1"}), ("env.A", "1"), ("working_dir", "/"), ("image", "x"), ("command", "x")):
        body = json.dumps({"job_variables": {key: value}})
        assert place.ask("prefect", "POST", create(place), place.known, body)[0] == 422, key
    assert place.runs() == before
    # A run that waits, and such variables that reach the database on another way: the worker does without them.
    later = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "2100-01-01T00:00:00Z"}}}
    run = json.loads(place.ask("prefect", "POST", create(place), place.known, json.dumps(later))[2])["id"]
    assert place.ask("prefect", "PATCH", f"/api/flow_runs/{run}", place.known, place.order(marks[1]))[0] == 422
    deployment = f"/api/deployments/{place.deployment}"
    assert place.ask("prefect", "PATCH", deployment, place.known, place.order(marks[2]))[0] == 204
    kept = json.loads(place.ask("prefect", "GET", deployment, place.known)[2])
    assert str(marks[2]) in kept["job_variables"]["command"]
    now = {"state": {"type": "SCHEDULED", "state_details": {"scheduled_time": "2020-01-01T00:00:00Z"}}, "force": True}
    path = f"/api/flow_runs/{run}/set_state"
    assert place.ask("prefect", "POST", path, place.known, json.dumps(now))[0] in (200, 201)

    def state() -> str:
        return str(json.loads(place.ask("prefect", "GET", f"/api/flow_runs/{run}", place.known)[2])["state_type"])

    eventually(lambda: state() in ("COMPLETED", "FAILED", "CRASHED"), within=600)
    assert state() == "COMPLETED", (place.folder / "worker.log").read_text()[-3000:]
    assert not any(mark.exists() for mark in marks)


def test_no_page_writes_to_or_reads_from_mlflow(place: Place) -> None:
    port = urlsplit(place.url("mlflow")).port
    count = json.dumps({"max_results": 100})
    reading, making = "/api/2.0/mlflow/experiments/search", "/api/2.0/mlflow/experiments/create"

    def experiments() -> int:
        return len(json.loads(place.ask("mlflow", "POST", reading, JSON, count)[2])["experiments"])

    before = experiments()
    for kind in ("application/json", "text/plain"):
        headers = {"Origin": EVIL, "Content-Type": kind}
        assert place.ask("mlflow", "POST", making, headers, '{"name": "evil"}')[0] == 403
        # Private addresses' patterns would let names pass that only begin like one.
        for host in ("attacker.example", f"attacker.example:{port}", "10.attacker.example", "192.168.attacker.example"):
            for method, path, body in (("POST", making, '{"name": "evil"}'), ("GET", reading, ""), ("GET", "/", "")):
                answer = place.ask("mlflow", method, path, headers | {"Host": host}, body)
                assert answer[0] == 403 and "Host" in answer[2], (host, path)
    wanted = {"Origin": EVIL, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type"}
    assert "access-control-allow-origin" not in place.ask("mlflow", "OPTIONS", making, wanted)[1]
    assert experiments() == before
    assert place.ask("mlflow", "GET", "/", {"Host": f"localhost:{port}"})[0] == 200


def test_the_secret_is_the_owners_alone_and_nothing_that_is_kept_has_it(place: Place) -> None:
    path = place.home / "servers" / "prefect.secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and len(place.secret) > 30
    assert stat.S_IMODE(place.home.stat().st_mode) == 0o700
    token = place.secret.partition(":")[2].encode()
    holders = [p for p in place.folder.rglob("*") if p.is_file() and p != path and token in p.read_bytes()]
    assert holders == []
    # A log is no place to log in from: it names the file.
    assert str(path) in (place.folder / "ui.log").read_text()
