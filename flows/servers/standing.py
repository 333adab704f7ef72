"""The standing servers of a home: `mopd ui` starts them, and the other commands find them here.

A server is identified by its process: the home has a record of the process, which must still be the one that listens
on the port. So a server of another home is never mistaken for it and never receives the secret.
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
    """Serve MLflow's and Prefect's pages over a home until Ctrl-C.

    A running run has its own Prefect server over the home. That server is used until the run ends and is then replaced
    by one at the same address, because two servers over one database conflict.

    Args:
        home: `$MOPD_HOME`.
        host: Address to listen on.
        mlflow_port: Port of MLflow's server; by default the usual port or the next free one.
        prefect_port: Port of Prefect's server; by default the usual port or the next free one.

    Raises:
        UserError: the home already has standing servers, a given port is taken, or a server does not start.
    """
    keep_private(home)
    servers: list[Server] = []
    held = contextlib.ExitStack()
    # A process started in the background inherits an ignored SIGINT and would leave its servers behind on SIGTERM.
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
        _print("ending the servers")
    finally:
        for server in servers:
            _record_of(home, server.name).unlink(missing_ok=True)
        if servers:
            _record_of(home, "prefect").unlink(missing_ok=True)
        stop(servers)
        held.close()


def _take_over(home: Path, host: str, port: int, *, exact: bool) -> Server:
    """Start Prefect's server after a run has ended, in place of that run's server."""
    with one_start_at_a_time(home) as starting:
        server = start_prefect(home, host, choose_port(host, port, "Prefect", exact, held=starting))
        wait_until_ready(server)
        _record(home, server)
    _print(f"Prefect  {server.url} (the run that served it has ended)")
    return server


def _show_pages(home: Path, mlflow: Server, prefect: str) -> None:
    _print(f"MLflow   {home_page(mlflow.url)}")
    # The latest runs, the newest first.
    kept = sorted((home / "runs").glob("*/mlflow.json"), key=lambda path: path.stat().st_mtime)[-RUNS_SHOWN:]
    for path in reversed(kept):
        _print(path.parent.name)
        for line in page_lines(mlflow.url, home, path.parent.name):
            _print(line)
    _print(f"Prefect  {prefect}")
    _print(f"         {login(home)}")
    _print("Ctrl-C ends them.")


def standing(home: Path, name: str, *, lasting: bool = False) -> str:
    """URL of a server of `mopd ui`; empty if none answers.

    Args:
        home: `$MOPD_HOME`.
        name: `prefect` or `mlflow`.
        lasting: Exclude a run's own Prefect server, which ends with that run.
    """
    kept = _read_record(_record_of(home, name))
    if kept is None or (lasting and kept["lent"]) or not _lives(kept):
        return ""
    return str(kept["url"]) if answers(kept["url"] + HEALTH[name]) else ""


@contextlib.contextmanager
def run_server(home: Path, server: Server) -> Iterator[None]:
    """Record the Prefect server of a run, so that `mopd ui` finds it, for the duration of the block."""
    path = _record_of(home, f"{RUN_RECORD}{server.process.pid}")
    _write_record(path, _facts(server))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _of_run(home: Path) -> dict[str, Any] | None:
    """The record of a live Prefect server that a run has started, or None."""
    folder = home.resolve() / "servers"
    kept = [record for path in folder.glob(f"{RUN_RECORD}*.json") if (record := _read_record(path)) is not None]
    return next((record for record in kept if _lives(record)), None)


def _lives(record: Mapping[str, Any]) -> bool:
    """Whether the process of a record is still the one that listens on its port."""
    pid, start = record["pid"], record["start"]
    return bool(start) and start_of(pid) == start and listens(pid, urlsplit(record["url"]).port or 0)


def prefect_client(home: Path) -> dict[str, str]:
    """Client settings for the Prefect server that outlives a run: that of `PREFECT_API_URL`, or that of `mopd ui`.

    The home's secret is sent only to a server of the home. The password of another server is in the environment.

    Raises:
        UserError: there is no such server.
    """
    own, api = standing(home, "prefect"), os.environ.get("PREFECT_API_URL", "").rstrip("/")
    if not own and not api:
        raise UserError(
            f"no standing Prefect server for {home}: start `mopd ui --home {home}` in another terminal and leave it "
            f"running, or set PREFECT_API_URL"
        )
    url = api.removesuffix("/api") if api else own
    settings = {"PREFECT_API_URL": f"{url}/api"}
    return settings | client_secret(home) if own and _is_same(url, own) else settings


def _is_same(one: str, other: str) -> bool:
    """Whether two URLs have the same host and port, where all names of the loopback count as one."""
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
    """A server's record. None if the file is missing, damaged or of another version: it identifies no server."""
    try:
        kept = json.loads(path.read_text())
        lent = bool(kept.get("lent", False))
        return {"url": str(kept["url"]), "pid": int(kept["pid"]), "start": int(kept["start"]), "lent": lent}
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _record_of(home: Path, name: str) -> Path:
    return home.resolve() / "servers" / f"{name.lower()}.json"


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
