"""The servers a run talks to: a Prefect server of its own over the home, unless the user has a standing one."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from experts.errors import UserError
from flows.servers import (
    PREFECT_PORT,
    Server,
    choose_port,
    mlflow_environment,
    one_start_at_a_time,
    prefect_environment,
    start_prefect,
    stop,
    wait_until_ready,
    without_secrets,
)

HOST = "127.0.0.1"
CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
DRAIN_SECONDS = 10.0


@contextlib.contextmanager
def prefect_session(home: Path, verbose: bool = False) -> Iterator[str]:
    """Make Prefect ready to be used in this process; yields the address of its pages, to be shown.

    A server is started in a process group of its own, so that Ctrl-C reaches only this process and the end of the run
    can still be recorded. With `PREFECT_API_URL` set by the user nothing is started.

    Args:
        home: `$MOPD_HOME`; Prefect's database and settings are under it.
        verbose: Show Prefect's own log on the terminal; it is kept in Prefect in any case.

    Raises:
        UserError: the server does not start, or the user's standing one does not answer.
    """
    os.environ.update(prefect_environment(home) | mlflow_environment())
    # Prefect writes the exceptions of failed tasks to a folder that does not follow its home.
    os.environ.setdefault("PREFECT_RESULTS_LOCAL_STORAGE_PATH", str(home.resolve() / "prefect" / "storage"))
    # Errors reach the terminal as one message of ours; Prefect's pages keep the tracebacks.
    level = "INFO" if verbose else "CRITICAL"
    os.environ.setdefault(CONSOLE_LEVEL, level)
    with _warnings_shown(), _server(home) as pages:
        yield pages


@contextlib.contextmanager
def _server(home: Path) -> Iterator[str]:
    standing = os.environ.get("PREFECT_API_URL")
    if standing:
        _expect_answer(standing)
        yield without_secrets(standing.removesuffix("/api"))
        return
    with one_start_at_a_time(home) as starting:
        server = start_prefect(home, HOST, choose_port(HOST, PREFECT_PORT, "Prefect"))
        try:
            os.environ["PREFECT_API_URL"] = f"{server.url}/api"
            # The import takes seconds, in which the server starts.
            import prefect  # noqa: F401

            wait_until_ready(server)
            starting.close()
            yield server.url
        finally:
            _end(server)


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Our own warnings still reach the terminal, which Prefect takes from every logger, at a level of its own."""
    shown = logging.lastResort
    if shown is None or os.environ[CONSOLE_LEVEL] != "CRITICAL":
        yield
        return
    ours = [logging.getLogger(package) for package in ("flows", "evals", "stages", "experts")]
    for logger in ours:
        logger.addHandler(shown)
    try:
        yield
    finally:
        for logger in ours:
            logger.removeHandler(shown)


def _expect_answer(api: str) -> None:
    """Ask the user's own server for a sign of life, with the user's own settings of Prefect."""
    from prefect import get_client

    with get_client(sync_client=True) as client:
        fault = client.api_healthcheck()
    if fault is not None:
        raise UserError(
            f"PREFECT_API_URL: {without_secrets(api)} does not answer ({without_secrets(str(fault))}); start that "
            f"server, or unset the variable and a server is started for the run"
        )


def _end(server: Server) -> None:
    """Send what Prefect still holds in its queues, then end the server."""
    if server.process.poll() is None and "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=DRAIN_SECONDS)
    stop([server])
    del os.environ["PREFECT_API_URL"]
