"""The Prefect server of a run: that of `PREFECT_API_URL`, that of `mopd ui`, or a separate one over the home."""

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from base.errors import UserError
from flows.servers.access import SECRET_FILE, client_secret
from flows.servers.standing import prefect_client, run_server, standing
from flows.servers.start import (
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

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

HOST = "127.0.0.1"
REFUSED = (401, 403)
CONSOLE_LEVEL = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"
DRAIN_SECONDS = 10.0
LOOK_SECONDS = 0.5
logger = logging.getLogger(__name__)


@contextlib.contextmanager
def prefect_session(home: Path, verbose: bool = False) -> Iterator[str]:
    """Prepare Prefect for use in this process, and yield the URL of its pages, without secrets.

    A server is started in its own process group, so that Ctrl-C reaches only this process and the end of the run can
    still be recorded. No server is started if there is a standing one.

    Args:
        home: `$MOPD_HOME`, with Prefect's database and settings.
        verbose: Show Prefect's log on the terminal; Prefect stores it in any case.

    Raises:
        UserError: the server does not start, or the user's standing server does not answer.
    """
    os.environ.update(prefect_environment(home) | mlflow_environment())
    # Prefect writes the exceptions of failed tasks to a folder that is not below PREFECT_HOME by default.
    os.environ.setdefault("PREFECT_RESULTS_LOCAL_STORAGE_PATH", str(home.resolve() / "prefect" / "storage"))
    # The terminal shows one message for each error; Prefect's pages have the tracebacks.
    level = "INFO" if verbose else "CRITICAL"
    os.environ.setdefault(CONSOLE_LEVEL, level)
    with _warnings_shown(), _server(home) as pages:
        yield pages


@contextlib.contextmanager
def _server(home: Path) -> Iterator[str]:
    if os.environ.get("PREFECT_API_URL") or standing(home, "prefect", lasting=True):
        settings = prefect_client(home)
        with _variables(settings):
            from prefect import get_client

            with get_client(sync_client=True) as client:
                expect_answer(client, settings["PREFECT_API_URL"])
            yield without_secrets(settings["PREFECT_API_URL"].removesuffix("/api"))
        return
    with one_start_at_a_time(home) as starting:
        server = start_prefect(home, HOST, choose_port(HOST, PREFECT_PORT, "Prefect", held=starting))
        with _variables({"PREFECT_API_URL": f"{server.url}/api"} | client_secret(home)):
            try:
                # The import takes seconds, during which the server starts.
                import prefect  # noqa: F401

                wait_until_ready(server)
                with contextlib.ExitStack() as held:
                    held.enter_context(run_server(home, server))
                    starting.close()
                    held.enter_context(_watched(server))
                    yield server.url
            finally:
                _end(server)


@contextlib.contextmanager
def _watched(server: Server) -> Iterator[None]:
    """Log a warning from a thread if the server ends inside the block.

    If the server of another home takes over the port, it rejects the secret of this home.
    """
    over = threading.Event()

    def watch() -> None:
        while not over.wait(LOOK_SECONDS):
            if server.process.poll() is not None:
                logger.warning(
                    "Prefect's server of this run ended with code %s (log: %s); the run goes on without its pages",
                    server.process.returncode,
                    server.log,
                )
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@contextlib.contextmanager
def _variables(wanted: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _warnings_shown() -> Iterator[None]:
    """Show the warnings of our packages on the terminal, where Prefect sets its own level for all loggers."""
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


def expect_answer(client: "SyncPrefectClient", api: str) -> None:
    """Check that a server answers and accepts this client's password.

    Args:
        client: A client with the user's own settings of Prefect.
        api: The server's URL, for the message.

    Raises:
        UserError: the server does not answer, or requires another password.
    """
    import httpx

    fault = client.api_healthcheck()
    if fault is not None:
        raise UserError(
            f"PREFECT_API_URL: {without_secrets(api)} does not answer ({without_secrets(str(fault))}); start that "
            f"server, or unset the variable: then the run starts its own server"
        )
    try:
        client.api_version()
    except httpx.HTTPStatusError as error:
        if error.response.status_code not in REFUSED:
            raise
        raise UserError(
            f"PREFECT_API_URL: {without_secrets(api)} requires a password; set PREFECT_API_AUTH_STRING to it (if "
            f"`mopd ui` of another home started it, the password is in that home's servers/{SECRET_FILE})"
        ) from None


def _end(server: Server) -> None:
    """Send the records in Prefect's queues, then end the server."""
    if server.process.poll() is None and "prefect" in sys.modules:
        from prefect.events.worker import EventsWorker
        from prefect.logging.handlers import APILogWorker

        for worker in (APILogWorker, EventsWorker):
            worker.drain_all(timeout=DRAIN_SECONDS)
    stop([server])
