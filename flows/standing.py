"""The standing servers of a home: those of `mopd ui`, and how every other command finds them.

A server is known by its process: the home has a record of it, and the process must still be the one that listens on
the port. So no other home's server is taken for it, and none of them receives the secret.
"""

import contextlib
import json
import os
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

from experts.errors import UserError
from flows.access import client_secret, login
from flows.listeners import listens, start_of
from flows.servers import (
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
from flows.signals import interruptible
from stages.core.private import keep_private

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEALTH = {"prefect": "/api/health", "mlflow": "/health"}


def ui(
    home: Path,
    host: str = "127.0.0.1",
    mlflow_port: int | None = None,
    prefect_port: int | None = None,
) -> None:
    """Serve MLflow's and Prefect's pages over a home until Ctrl-C; a port that is not given may move to a free one.

    Raises:
        UserError: the home has standing servers already, a named port is taken, or a server does not start.
    """
    keep_private(home)
    servers: list[Server] = []
    held = contextlib.ExitStack()
    # A process started in the background inherits an ignored SIGINT, and would leave its servers behind on TERM.
    held.enter_context(interruptible(background=True))
    try:
        with one_start_at_a_time(home):
            if present := standing(home, "prefect"):
                raise UserError(f"`mopd ui` serves {home} already: {present}")
            mlflow_at = choose_port(host, mlflow_port or MLFLOW_PORT, "MLflow", exact=mlflow_port is not None)
            prefect_at = choose_port(host, prefect_port or PREFECT_PORT, "Prefect", exact=prefect_port is not None)
            servers.append(start_mlflow(home, host, mlflow_at))
            servers.append(start_prefect(home, host, prefect_at))
            for server in servers:
                wait_until_ready(server)
            for server in servers:
                _record(home, server)
        for server in servers:
            _say(f"{server.name:8} {server.url}")
        _say(f"         {login(home)}")
        _say("Ctrl-C ends both.")
        while all(server.process.poll() is None for server in servers):
            time.sleep(0.5)
        ended = next(server for server in servers if server.process.poll() is not None)
        raise UserError(f"{ended.name} ended with code {ended.process.returncode}:\n{tail(ended.log)}")
    except KeyboardInterrupt:
        _say("ending both servers")
    finally:
        for server in servers:
            _record_of(home, server.name).unlink(missing_ok=True)
        stop(servers)
        held.close()


def standing(home: Path, name: str) -> str:
    """Address of a server of `mopd ui`; empty where there is none that answers.

    Args:
        home: `$MOPD_HOME`.
        name: `prefect` or `mlflow`.
    """
    try:
        kept = json.loads(_record_of(home, name).read_text())
        url, pid, start = str(kept["url"]), int(kept["pid"]), int(kept["start"])
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        # A record that is broken, or of another version, is of no server that could be known.
        return ""
    if not start or start_of(pid) != start or not listens(pid, urlsplit(url).port or 0):
        return ""
    return url if answers(url + HEALTH[name]) else ""


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
    pid = server.process.pid
    kept = {"url": server.url, "pid": pid, "start": start_of(pid)}
    path = _record_of(home, server.name)
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(kept))
    temporary.replace(path)


def _record_of(home: Path, name: str) -> Path:
    return home.resolve() / "servers" / f"{name.lower()}.json"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
