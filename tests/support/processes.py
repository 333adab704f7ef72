"""Looking at processes from a test, and servers that stand while it looks."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

from flows.servers import start as servers
from flows.servers.access import home_secret
from tests.support.homes import with_databases

HOST = "127.0.0.1"


@contextlib.contextmanager
def standing(start: Callable[[Path, str, int], servers.Server], home: Path, port: int) -> Iterator[servers.Server]:
    """MLflow's or Prefect's server over a home, at the first free port from this one on; gone afterwards."""
    with_databases(home)
    with contextlib.ExitStack() as held:
        with servers.one_start_at_a_time(home) as starting:
            server = start(home, HOST, servers.choose_port(HOST, port, "a test's server", held=starting))
            held.callback(servers.stop, [server])
            servers.wait_until_ready(server)
        yield server


@contextlib.contextmanager
def prefect_of(home: Path, port: int) -> Iterator[servers.Server]:
    """Prefect's server over a home, which this process's own clients of Prefect talk to."""
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with standing(servers.start_prefect, home, port) as server:
        mine = {PREFECT_API_URL: f"{server.url}/api", PREFECT_API_AUTH_STRING: home_secret(home)}
        with temporary_settings(mine):
            yield server


def eventually(condition: Callable[[], Any], within: float = 240.0) -> Any:
    """Wait until the condition holds; returns its value. The limit is for a machine that is busy with other tests."""
    deadline, pause = time.monotonic() + within, 0.02
    while not (value := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(pause)
        # Looking through all processes takes a tenth of a second itself, from what is being waited for.
        pause = min(1.2 * pause, 0.25)
    return value


def jobs_of(supervisor: int) -> list[psutil.Process]:
    """The node processes below a supervisor: the children of its fork servers."""
    jobs = []
    for server in psutil.Process(supervisor).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            jobs += server.children()
    return jobs


def below(ancestor: psutil.Process, word: str = "") -> list[psutil.Process]:
    """Its descendants with this in their command line. One that ends meanwhile is none of them."""
    found = []
    for process in ancestor.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found


def listening(ancestor: psutil.Process) -> set[str]:
    """Addresses on which its descendants listen."""
    found = set()
    for process in below(ancestor):
        with contextlib.suppress(psutil.NoSuchProcess):
            found |= {c.laddr.ip for c in process.net_connections() if c.status == psutil.CONN_LISTEN}
    return found


def ended(pid: int) -> bool:
    """Whether the process is gone, or dead and only waiting to be reaped by whoever adopted it."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
