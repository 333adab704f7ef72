"""The standing servers of a home: those of `mopd ui`, and how every other command finds them.

A server is known by its process: the home has a record of it, and the process must still be the one that listens on
the port. So no other home's server is taken for it, and none of them receives the secret.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from base.errors import UserError
from base.listeners import listens, start_of
from base.private import keep_private
from base.signals import interruptible
from flows.servers.access import client_secret, login
from flows.servers.pages import home_page, page_lines
from flows.servers.start import (
    MLFLOW_PORT,
    PREFECT_PORT,
    Server,
    answers,
    choose_port,
    one_start_at_a_time,
    start_mlflow,
    start_prefect,
    stop,
    tail,
    wait_until_ready,
)

LOOPBACK = ("127.0.0.1", "localhost", "::1")
RUN_RECORD, RUNS_SHOWN, LOOK_SECONDS = "prefect-run-", 5, 0.5
HEALTH = {"prefect": "/api/health", "mlflow": "/health"}


def ui(
    home: Path,
    host: str = "127.0.0.1",
    mlflow_port: int | None = None,
    prefect_port: int | None = None,
) -> None:
    """Serve MLflow's and Prefect's pages over a home until Ctrl-C; a port that is not given may move to a free one.

    A run under way has a Prefect server of its own over the home. It is used as long as it is there, and then replaced
    by one at the same address: two servers over one database get into each other's way.

    Raises:
        UserError: the home has standing servers already, a named port is taken, or a server does not start.
    """
    keep_private(home)
    servers: list[Server] = []
    held = contextlib.ExitStack()
    # A process started in the background inherits an ignored SIGINT, and would leave its servers behind on TERM.
    held.enter_context(interruptible(background=True))
    try:
        with one_start_at_a_time(home) as starting:
            if present := standing(home, "mlflow") or standing(home, "prefect"):
                raise UserError(f"`mopd ui` serves {home} already: {present}")
            named = mlflow_port is not None
            mlflow_at = choose_port(host, mlflow_port or MLFLOW_PORT, "MLflow", named, held=starting)
            named = prefect_port is not None
            prefect_at = choose_port(host, prefect_port or PREFECT_PORT, "Prefect", named, held=starting)
            servers.append(start_mlflow(home, host, mlflow_at))
            lent = _of_run(home)
            if lent is None:
                servers.append(start_prefect(home, host, prefect_at))
            for server in servers:
                wait_until_ready(server)
            for server in servers:
                _record(home, server)
        if lent is not None:
            _write_record(_record_of(home, "prefect"), lent | {"lent": True})
        _show_pages(home, servers[0], lent["url"] if lent else servers[1].url)
        while all(server.process.poll() is None for server in servers):
            time.sleep(LOOK_SECONDS)
            if lent is not None and not _lives(lent):
                port = prefect_port or urlsplit(lent["url"]).port or PREFECT_PORT
                servers.append(_take_over(home, host, port, exact=prefect_port is not None))
                lent = None
        ended = next(server for server in servers if server.process.poll() is not None)
        raise UserError(f"{ended.name} ended with code {ended.process.returncode}:\n{tail(ended.log)}")
    except KeyboardInterrupt:
        _say("ending the servers")
    finally:
        for server in servers:
            _record_of(home, server.name).unlink(missing_ok=True)
        if servers:
            _record_of(home, "prefect").unlink(missing_ok=True)
        stop(servers)
        held.close()


def _take_over(home: Path, host: str, port: int, *, exact: bool) -> Server:
    """Start Prefect's server after that of a run has ended."""
    with one_start_at_a_time(home) as starting:
        server = start_prefect(home, host, choose_port(host, port, "Prefect", exact, held=starting))
        wait_until_ready(server)
        _record(home, server)
    _say(f"Prefect  {server.url} (the run that served it has ended)")
    return server


def _show_pages(home: Path, mlflow: Server, prefect: str) -> None:
    _say(f"MLflow   {home_page(mlflow.url)}")
    # The one that was written last is the one that people look for.
    kept = sorted((home / "runs").glob("*/mlflow.json"), key=lambda path: path.stat().st_mtime)[-RUNS_SHOWN:]
    for path in reversed(kept):
        _say(path.parent.name)
        for line in page_lines(mlflow.url, home, path.parent.name):
            _say(line)
    _say(f"Prefect  {prefect}")
    _say(f"         {login(home)}")
    _say("Ctrl-C ends them.")


def standing(home: Path, name: str, *, lasting: bool = False) -> str:
    """Address of a server of `mopd ui`; empty where there is none that answers.

    Args:
        home: `$MOPD_HOME`.
        name: `prefect` or `mlflow`.
        lasting: Leave out a run's own Prefect server, which ends with that run.
    """
    kept = _read_record(_record_of(home, name))
    if kept is None or (lasting and kept["lent"]) or not _lives(kept):
        return ""
    return str(kept["url"]) if answers(kept["url"] + HEALTH[name]) else ""


@contextlib.contextmanager
def run_server(home: Path, server: Server) -> Iterator[None]:
    """Let `mopd ui` find the Prefect server of a run for as long as it lasts."""
    path = _record_of(home, f"{RUN_RECORD}{server.process.pid}")
    _write_record(path, _facts(server))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _of_run(home: Path) -> dict[str, Any] | None:
    """The record of a Prefect server that a run under way has started."""
    folder = home.resolve() / "servers"
    kept = [record for path in folder.glob(f"{RUN_RECORD}*.json") if (record := _read_record(path)) is not None]
    return next((record for record in kept if _lives(record)), None)


def _lives(record: Mapping[str, Any]) -> bool:
    """Whether the process of a record is still the one that listens on its port."""
    pid, start = record["pid"], record["start"]
    return bool(start) and start_of(pid) == start and listens(pid, urlsplit(record["url"]).port or 0)


def prefect_client(home: Path) -> dict[str, str]:
    """Settings of a client of the server that outlives a run: the one of `PREFECT_API_URL`, or that of `mopd ui`.

    The home's secret goes to a server of the home alone; for another one the environment has the password.

    Raises:
        UserError: there is none.
    """
    own, api = standing(home, "prefect"), os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not own and not api:
        raise UserError(
            f"no Prefect server stands over {home}: start `mopd ui --home {home}` in another terminal and leave it "
            f"running, or set PREFECT_API_URL"
        )
    url = api.removesuffix("/api") if api else own
    settings = {"PREFECT_API_URL": f"{url}/api"}
    return settings | client_secret(home) if own and _is_same(url, own) else settings


def _is_same(one: str, other: str) -> bool:
    """Whether two addresses lead to the same place of this machine."""
    places = [urlsplit(address) for address in (one, other)]
    names = ["127.0.0.1" if place.hostname in LOOPBACK else place.hostname for place in places]
    return names[0] == names[1] and places[0].port == places[1].port


def _record(home: Path, server: Server) -> None:
    _write_record(_record_of(home, server.name), _facts(server))


def _facts(server: Server) -> dict[str, Any]:
    pid = server.process.pid
    return {"url": server.url, "pid": pid, "start": start_of(pid), "lent": False}


def _write_record(path: Path, kept: Mapping[str, Any]) -> None:
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(kept))
    temporary.replace(path)


def _read_record(path: Path) -> dict[str, Any] | None:
    """A server's record; None for one that is not there, is broken or of another version: it is of no known server."""
    try:
        kept = json.loads(path.read_text())
        lent = bool(kept.get("lent", False))
        return {"url": str(kept["url"]), "pid": int(kept["pid"]), "start": int(kept["start"]), "lent": lent}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _record_of(home: Path, name: str) -> Path:
    return home.resolve() / "servers" / f"{name.lower()}.json"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
