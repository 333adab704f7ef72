"""Starts MLflow's and Prefect's servers over one home, and provides the settings of both libraries.

Free of torch and of both libraries: the servers are started as processes, each in its own group, and end with the
process that started them.
"""

import base64
import contextlib
import logging
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from base.errors import UserError
from base.listeners import listens
from base.processes import end_with_parent
from flows.servers.access import mlflow_server_access, prefect_server_access

MLFLOW_PORT = 5000
PREFECT_PORT = 4200
START_SECONDS = 240.0
STOP_SECONDS = 5.0
# Of a log, in a message.
LAST_LINES = 15
LOCK_SECONDS = 5.0
PORTS_TRIED = 50
LAST_PORT = 65535
logger = logging.getLogger(__name__)

QUIET = {"DO_NOT_TRACK": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
# MLflow's jobs evaluate traces of applications, and there are none here. They would cost seven processes of 290 MB.
WITHOUT_JOBS = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
# An unreachable MLflow server must delay a stage by seconds only: one retry of ten seconds, then the outbox waits.
MLFLOW_CLIENT = {
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    # Otherwise MLflow prints the server's address, including a password in it, at the end of every run.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# A URL's fragment (after #) is kept: browsers do not send it to a server, and the pages' addresses need it.
CREDENTIALS, QUERY = re.compile(r"(?<=://)[^\s'\"<>]*@"), re.compile(r"(://[^\s'\"<>?#]*)\?[^\s'\"<>#]*")


@dataclass(frozen=True)
class Server:
    """One started server.

    Attributes:
        name: Name for messages.
        process: Leader of its own process group.
        url: URL for a browser.
        health: URL that answers 200 when the server is ready.
        log: File with the server's output.
    """

    name: str
    process: subprocess.Popen[bytes]
    url: str
    health: str
    log: Path


def mlflow_uri(home: Path) -> str:
    """The URI of the tracking store: `MLFLOW_TRACKING_URI` if it is set, else SQLite in the home."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home.resolve() / 'mlflow.db'}"


def without_secrets(text: str) -> str:
    """The text, a URL or one that contains URLs, without the URLs' users, passwords and queries."""
    return QUERY.sub(r"\1?…", CREDENTIALS.sub("", text))


def mlflow_artifacts(home: Path) -> Path:
    """The folder in which the home's own tracking store keeps artifacts."""
    return home.resolve() / "mlartifacts"


def mlflow_environment() -> dict[str, str]:
    """Settings of the MLflow client, without those that the user has set. Set them before mlflow is imported."""
    return {name: value for name, value in (QUIET | MLFLOW_CLIENT).items() if name not in os.environ}


def prefect_environment(home: Path) -> dict[str, str]:
    """Settings of Prefect: files under the home, no analytics, and a start-up time-out for slow machines.

    The user's own settings take precedence; `PREFECT_API_URL` in the environment selects a standing server.
    """
    wanted = QUIET | {
        "PREFECT_HOME": str(home.resolve() / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": str(int(START_SECONDS)),
    }
    return {name: os.environ.get(name, value) for name, value in wanted.items()}


def prefect_run_page(base: str, flow_run_id: str) -> str:
    """Address of a flow run in Prefect's pages."""
    return f"{base}/runs/flow-run/{flow_run_id}"


def local_url(port: int, host: str = "127.0.0.1") -> str:
    """URL of a server on this machine. One that listens on all interfaces is opened through the loopback."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"


def choose_port(
    host: str,
    wanted: int,
    name: str,
    exact: bool = False,
    alone: bool = False,
    held: contextlib.ExitStack | None = None,
) -> int:
    """Find a free port.

    Args:
        host: Address to listen on.
        wanted: The first choice.
        exact: The user set this port, so no other is accepted.
        name: The server's name, for messages.
        alone: The port must not even be bound by a process: vLLM binds its port long before it listens.
        held: Reserves the port until this stack is closed, against other starts in this user's homes. Needed because
            a server listens only seconds after its port is chosen.

    Raises:
        UserError: the named port is taken, or none of the next fifty is free.
    """
    for port in range(wanted, min(wanted + (1 if exact else PORTS_TRIED), LAST_PORT + 1)):
        if _is_free(host, port, alone) and (held is None or _claim(port, held)):
            return port
    if exact:
        raise UserError(f"{name}: port {wanted} on {host} is taken; choose another one")
    raise UserError(f"{name}: no free port on {host} from {wanted} to {wanted + PORTS_TRIED - 1}")


def start_mlflow(home: Path, host: str, port: int) -> Server:
    """Start MLflow's server over the home's tracking store. Use `wait_until_ready` before the first request."""
    uri = mlflow_uri(home)
    if "://" in uri and uri.split("://", 1)[0] in ("http", "https"):
        shown = without_secrets(uri)
        raise UserError(f"MLFLOW_TRACKING_URI={shown}: that server has pages of its own; open it in a browser")
    command = ["mlflow", "server", "--workers", "1", "--host", host, "--port", str(port)]
    command += ["--artifacts-destination", str(mlflow_artifacts(home))]
    # The URI may have a password, so it is not passed on the command line, which every user can read.
    environment = WITHOUT_JOBS | os.environ | QUIET | mlflow_server_access(host, port)
    environment["MLFLOW_BACKEND_STORE_URI"] = uri
    return _start("MLflow", command, environment, home, local_url(port, host), "/health")


def start_prefect(home: Path, host: str, port: int) -> Server:
    """Start Prefect's server over the home's database. Use `wait_until_ready` before the first request."""
    url = local_url(port, host)
    environment = os.environ | prefect_environment(home) | prefect_server_access(home, host, port)
    environment |= {"PREFECT_API_URL": f"{url}/api", "PREFECT_UI_API_URL": f"{url}/api"}
    command = ["prefect", "server", "start", "--host", host, "--port", str(port)]
    return _start("Prefect", command, environment, home, url, "/api/health")


@contextlib.contextmanager
def one_start_at_a_time(home: Path) -> Iterator[contextlib.ExitStack]:
    """Lock the home from the choice of a port until the server answers.

    Two servers that start at once over one new home would create the same tables. Pass the yielded stack to
    `choose_port`, so that starts over two homes do not choose the same port, and `close` it when the server answers.

    Raises:
        UserError: another start over this home does not finish.
    """
    home_lock = home.resolve() / "locks" / "servers.lock"
    home_lock.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        _take(FileLock(home_lock), held)
        yield held


def _take(lock: FileLock, held: contextlib.ExitStack) -> None:
    """Take a home's lock, with a warning if the wait is long."""
    try:
        held.enter_context(lock.acquire(timeout=LOCK_SECONDS))
    except Timeout:
        logger.warning("another process is starting a server of this home (%s); waiting for it", lock.lock_file)
        try:
            held.enter_context(lock.acquire(timeout=START_SECONDS))
        except Timeout:
            raise UserError(
                f"{lock.lock_file}: another program has held this for {START_SECONDS:.0f} s; `fuser` with this path "
                f"names it"
            ) from None


def _claim(port: int, held: contextlib.ExitStack) -> bool:
    """Take the lock of a port, which all homes of this user share. False if another start holds it."""
    folder = Path(tempfile.gettempdir()) / f"mopd-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            held.enter_context(FileLock(folder / f"port-{port}.lock").acquire(timeout=0))
            return True
    except Timeout:
        return False
    except OSError as error:
        logger.debug("%s cannot be used: %s", folder, error)
    logger.warning("%s belongs to another user; two starts at once may choose the same port", folder)
    return True


def wait_until_ready(server: Server, seconds: float = START_SECONDS) -> None:
    """Wait until this server, and not another one on its port, answers.

    Raises:
        UserError: the server ended or did not answer in time; the message has the end of its log.
    """
    deadline, port = time.monotonic() + seconds, urllib.parse.urlsplit(server.url).port
    assert port is not None
    while not (listens(server.process.pid, port) and answers(server.health)):
        if server.process.poll() is not None:
            raise UserError(f"{server.name} ended with code {server.process.returncode}:\n{tail(server.log)}")
        if time.monotonic() > deadline:
            raise UserError(f"{server.name} did not answer within {seconds:.0f} s:\n{tail(server.log)}")
        time.sleep(0.2)


def stop(servers: Sequence[Server]) -> None:
    """End the servers' process groups by SIGTERM, then by SIGKILL for those that remain."""
    for server in servers:
        _signal(server, signal.SIGTERM)
    deadline = time.monotonic() + STOP_SECONDS
    for server in servers:
        try:
            server.process.wait(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            logger.info("%s does not stop; it is killed", server.name)
        _signal(server, signal.SIGKILL)
        server.process.wait()


def _start(
    name: str, arguments: Sequence[str], environment: Mapping[str, str], home: Path, url: str, health: str
) -> Server:
    log = home.resolve() / "servers" / f"{name.lower()}-{urllib.parse.urlsplit(url).port}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - only the main thread, alone, starts servers
        )
    return Server(name, process, url, url + health, log)


def _is_free(host: str, port: int, alone: bool) -> bool:
    with socket.socket() as probe:
        if not alone:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def answers(address: str, password: str = "") -> bool:
    """Whether an address answers a GET with 200 within seconds.

    Args:
        address: A URL. A user and password in it are sent as basic authentication.
        password: `USER:PASSWORD` to send if the address has none.
    """
    scheme, _, rest = address.partition("://")
    credentials, _, place = rest.rpartition("@")
    request = urllib.request.Request(f"{scheme}://{place}")
    if login := urllib.parse.unquote(credentials) or password:
        request.add_header("Authorization", f"Basic {base64.b64encode(login.encode()).decode()}")
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False


def _signal(server: Server, number: signal.Signals) -> None:
    try:
        os.killpg(server.process.pid, number)
    except ProcessLookupError:
        logger.debug("%s is gone already", server.name)


def tail(log: Path) -> str:
    """The cause of a server's end from its log, without secrets: from the first error on, else the last lines."""
    logged = log.read_text(errors="replace").splitlines()
    first = next((i for i, line in enumerate(logged) if line.startswith("ERROR:")), max(0, len(logged) - LAST_LINES))
    return without_secrets("\n".join(logged[first : first + LAST_LINES]))
