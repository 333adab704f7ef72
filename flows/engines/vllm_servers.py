"""Supervision of vLLM servers: started on ports known before, restarted when they end, gone without remains.

Each server is a child of a fork server, in a process group of its own: when its leader ends, however, the fork server
kills what is left of the group (vLLM's engine and workers outlive a killed API server), and when this process ends,
however, the fork server ends them all. Only if both are killed at one moment can an engine be left.
"""

import contextlib
import json
import os
import random
import re
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from flows.engines.children import Child, ForkServer, ServerDiedError
from flows.engines.devices import Lease
from flows.engines.forkserver import GRACE_SECONDS
from flows.engines.vllm_commands import ServerCommand
from flows.servers.start import choose_port, local_url
from stages.vllm.settings import FAULT

HOST = "127.0.0.1"
# Below the ports that the kernel gives to outgoing connections, and apart from those that people choose.
PORTS = range(20000, 32000)
# In so many seconds: one that ends now and then is started again for ever.
MOST_RESTARTS, RESTARTS_SECONDS = 5, 3600.0
HEALTH_SECONDS = 2.0
LOOK_SECONDS, HUNG_SECONDS = 10.0, 120.0
LAST_LINES = 15
# No proxy stands between us and a server of our own.
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
PORT_TAKEN = "address already in use"
# As Python prints it, or as vLLM logs it: "(EngineCore pid=7) ERROR 11-23 14:43:43 [core.py:1510] ValueError: …".
_ERROR = re.compile(r"^(?:\([^)]*\) ERROR [^\]]*\] )?(\w*(?:Error|Exception): .+)$", re.MULTILINE)
_MOMENT = 0.01


class VllmServerError(Exception):
    """A server does not come up, or ends again and again.

    Attributes:
        log: The file with its output.
        passing: Another attempt may go better: it has run before, or its port was taken.
    """

    def __init__(self, message: str, log: Path, *, passing: bool) -> None:
        super().__init__(message)
        self.log = log
        self.passing = passing


@dataclass
class RunningServer:
    """One server under our care.

    Attributes:
        command: How it is started.
        url: Where it listens, whether it answers or not.
        log: File with its output, of all its starts.
        answered: Whether it has been healthy since it was started last.
        seen: When it was healthy last, by the monotonic clock.
        looked: When it was asked last.
        restarts: How often it was started anew.
        recent: When, of late.
    """

    command: ServerCommand
    url: str
    log: Path
    arguments: tuple[str, ...]
    lease: Lease
    child: Child | None = None
    answered: bool = False
    seen: float = 0.0
    looked: float = 0.0
    restarts: int = 0
    recent: list[float] = field(default_factory=list)

    @property
    def label(self) -> str:
        """For messages."""
        return f"vLLM server {self.url} ({self.command.serves})"


class VllmServers:
    """A group of servers that live and end together; as a context manager it leaves none behind.

    One thread supervises; `stop` alone may be called from another, or from a signal handler.
    """

    def __init__(
        self,
        commands: Sequence[ServerCommand],
        home: Path,
        *,
        lease: Lease | None = None,
        host: str = HOST,
        ports: Sequence[int] | None = None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Choose ports; nothing is started yet.

        Args:
            commands: What is to run.
            home: `$MOPD_HOME`; logs go to its `servers` folder.
            lease: The devices of all of them, which whoever holds it closes after them.
            host: Address to listen on.
            ports: One for each; free ones are chosen when absent.
            say: Told what happens to the servers, a line at a time.

        Raises:
            UserError: no free port.
        """
        self._say = say
        self._fork_server: ForkServer | None = None
        self._stopped = False
        folder = home.resolve() / "servers"
        folder.mkdir(parents=True, exist_ok=True)
        shares = (lease or Lease()).split([command.gpus for command in commands])
        self.servers: list[RunningServer] = []
        for command, port, share in zip(commands, ports or free_ports(host, len(commands)), shares, strict=True):
            log = folder / f"vllm-{command.kind}-{port}.log"
            log.unlink(missing_ok=True)
            arguments = (*command.arguments, "--host", host, "--port", str(port))
            self.servers.append(RunningServer(command, local_url(port, host), log, arguments, share))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def urls(self) -> dict[str, list[str]]:
        """URLs by kind, known before the servers answer."""
        found: dict[str, list[str]] = {}
        for server in self.servers:
            found.setdefault(server.command.kind, []).append(server.url)
        return found

    def start(self, fork_server: ForkServer) -> None:
        """Start them all; returns at once.

        Raises:
            ServerDiedError: the fork server is gone.
        """
        self._fork_server = fork_server
        for server in self.servers:
            self._say(f"{server.label} is started; log {server.log}")
            self._start(server)

    def tend(self) -> None:
        """See how they are; one that ended or hangs is started again on its port. To be called every second or so.

        Raises:
            VllmServerError: a server ended before it ever answered, or more often than it is started anew.
            ServerDiedError: the fork server is gone, and the servers with it.
        """
        for server in self.servers:
            if self._stopped or server.child is None:
                return
            code = _wait(server.child, _MOMENT)
            if code is not None and not self._stopped:
                self._restart(server, code)
            elif code is None:
                self._look(server)

    def ready(self) -> bool:
        """Whether all have answered since they were started last, as far as `tend` has seen."""
        return not self._stopped and all(server.answered for server in self.servers)

    def stop(self) -> None:
        """End them, SIGTERM now and SIGKILL after a grace, and start none any more; returns at once."""
        self._stopped = True
        for server in self.servers:
            child = server.child
            if child is not None and child.exit_code is None:
                child.end(GRACE_SECONDS)

    @property
    def children(self) -> list[Child]:
        """The servers' processes, those that ended among them."""
        return [server.child for server in self.servers if server.child is not None]

    def close(self) -> None:
        """End them. Returns when all are gone; idempotent."""
        self.stop()
        deadline = time.monotonic() + GRACE_SECONDS + 2
        for server in self.servers:
            child = server.child
            if child is None:
                continue
            # A fork server that is gone has taken its children along, and `_wait` what they left.
            with contextlib.suppress(ServerDiedError):
                _wait(child, max(_MOMENT, deadline - time.monotonic()))
            while child.pid is not None and _group_lives(child.pid) and time.monotonic() < deadline:
                time.sleep(_MOMENT)
            server.child = None
            child.close()

    def _start(self, server: RunningServer) -> None:
        assert self._fork_server is not None
        server.child = self._fork_server.start(
            server.log,
            command=server.arguments,
            environment={**server.command.environment, **server.lease.environment},
            descriptors=server.lease.descriptors,
        )
        # A signal handler may have called `stop` in between.
        if self._stopped:
            server.child.end(0)

    def _look(self, server: RunningServer) -> None:
        """Ask whether it is well, until it answers for the first time and then now and then; end one that hangs."""
        now = time.monotonic()
        if server.answered and now < server.looked + LOOK_SECONDS:
            return
        server.looked = now
        health = ask_health(server.url)
        if health.well:
            if not server.answered:
                self._say(f"{server.label} answers")
            server.answered, server.seen = True, now
        elif health.fault is not None:
            assert server.child is not None
            self._say(f"{server.label} is out of service ({health.fault}); it is ended")
            server.child.end(0)
        elif server.answered and now > server.seen + HUNG_SECONDS:
            assert server.child is not None
            self._say(f"{server.label} has not answered for {now - server.seen:.0f} s; it is ended")
            server.child.end(0)
            server.seen = now

    def _restart(self, server: RunningServer, code: int) -> None:
        assert server.child is not None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if not server.answered and not server.restarts:
            told = tail(server.log)
            raise VllmServerError(
                f"{server.label} {how} before it answered:\n{told}", server.log, passing=PORT_TAKEN in told.lower()
            )
        now = time.monotonic()
        server.recent = [moment for moment in server.recent if moment > now - RESTARTS_SECONDS]
        if len(server.recent) == MOST_RESTARTS:
            message = f"{server.label} {how}, after {MOST_RESTARTS} restarts; its log ends with\n{tail(server.log)}"
            raise VllmServerError(message, server.log, passing=True)
        server.recent.append(now)
        server.restarts += 1
        server.answered = False
        self._say(f"{server.label} {how}; it is started again ({len(server.recent)} of {MOST_RESTARTS} times)")
        server.child.close()
        self._start(server)


def _wait(child: Child, seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except ServerDiedError:
        # The kernel killed the leader alone; nobody else would end its engine.
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        raise


def _group_lives(leader: int) -> bool:
    """Whether a process of a group is left that is not dead and only waits to be reaped."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


@dataclass(frozen=True)
class Health:
    """What a server answers when it is asked how it is.

    Attributes:
        well: Whether it serves.
        fault: Why it will not before it is started anew, in its own words, such as weights it failed to load.
    """

    well: bool
    fault: str | None = None


def ask_health(url: str) -> Health:
    """Ask a server; one that does not answer is not well and has no fault."""
    try:
        with _DIRECT.open(f"{url}/health", timeout=HEALTH_SECONDS) as response:
            return Health(response.status == 200)
    except urllib.error.HTTPError as error:
        with error:
            return Health(False, _fault(error.read()))
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return Health(False)


def _fault(body: bytes) -> str | None:
    try:
        return str(json.loads(body)[FAULT])
    except (ValueError, KeyError, TypeError):
        return None


def free_ports(host: str, count: int, first: int | None = None, *, exact: bool = False) -> list[int]:
    """Ports that nobody listens on now.

    Args:
        host: Address to listen on.
        count: How many.
        first: Where to look; by default somewhere at random, so that groups that choose at the same time are unlikely
            to take the same.
        exact: Only `first` and those that follow it will do.

    Raises:
        UserError: there are none.
    """
    ports: list[int] = []
    after = random.choice(PORTS) if first is None else first
    for _ in range(count):
        ports.append(choose_port(host, after, "vLLM server", exact, alone=True))
        after = ports[-1] + 1
    return ports


def tail(log: Path) -> str:
    """What a log tells of a server's end: the first error, which those of the processes around it follow; without one
    its last lines."""
    text = log.read_text(errors="replace") if log.exists() else ""
    error = _ERROR.search(text)
    return error.group(1) if error else "\n".join(text.splitlines()[-LAST_LINES:])
