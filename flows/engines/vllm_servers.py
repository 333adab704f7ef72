"""Supervises vLLM servers: starts them on ports chosen in advance, restarts them, and ends them completely.

Each server is a child of a fork server, in its own process group. When the group's leader ends for any reason, the
fork server kills the rest of the group (vLLM's engine and workers outlive a killed API server). When this process ends
for any reason, the fork server ends all groups. An engine can only be left behind if both are killed at the same
moment.
"""

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from flows.engines.devices import Lease
from flows.engines.fork_client import Child, ForkServer, ServerDiedError
from flows.engines.fork_server import GRACE_SECONDS
from flows.engines.server_health import ask_health
from flows.engines.vllm_commands import ServerCommand, together
from flows.servers.access import server_key
from flows.servers.start import choose_port, local_url
from stages.vllm.settings import KEY_VARIABLE

HOST = "127.0.0.1"
# Below the kernel's range for outgoing connections, and away from ports that users commonly choose.
PORTS = range(20000, 32000)
# At most so many restarts in so many seconds. A server that fails only rarely is restarted without limit.
MOST_RESTARTS, RESTARTS_SECONDS = 5, 3600.0
LOOK_SECONDS, HUNG_SECONDS = 10.0, 120.0
LAST_LINES = 15
PORT_TAKEN = "address already in use"
# As Python prints it, or as vLLM logs it: "(EngineCore pid=7) ERROR 11-23 14:43:43 [core.py:1510] ValueError: …".
_ERROR = re.compile(r"^(?:\([^)]*\) ERROR [^\]]*\] )?(\w*(?:Error|Exception): .+)$", re.MULTILINE)
_MOMENT = 0.01


class VllmServerError(Exception):
    """A server does not start, or fails repeatedly.

    Attributes:
        log: The file with the server's output.
        passing: Another attempt may succeed: the server has answered before, or its port was taken.
    """

    def __init__(self, message: str, log: Path, *, passing: bool) -> None:
        super().__init__(message)
        self.log = log
        self.passing = passing


@dataclass
class RunningServer:
    """One supervised server. Times are of the monotonic clock.

    Attributes:
        command: The command that starts it.
        url: Its URL, also while it does not answer.
        log: File with the output of all its starts.
        answered: Whether it has been healthy since its last start.
        seen: Time of its last healthy answer.
        looked: Time of the last health check.
        restarts: Number of restarts.
        recent: Times of the restarts in the last `RESTARTS_SECONDS`.
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
        """The server's name in messages."""
        return f"vLLM server {self.url} ({self.command.serves})"


class VllmServers:
    """A group of servers that start and end together. As a context manager it ends all of them on exit.

    One thread supervises the group. Only `stop` may be called from another thread or from a signal handler.
    """

    def __init__(
        self,
        commands: Sequence[ServerCommand],
        home: Path,
        *,
        lease: Lease | None = None,
        host: str = HOST,
        ports: Sequence[int] | None = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        """Choose ports; nothing is started yet.

        Args:
            commands: The servers to run.
            home: `$MOPD_HOME`; logs go to its `servers` folder.
            lease: The devices of all servers. The caller closes it after the servers have ended.
            host: Address to listen on.
            ports: One for each server; by default free ports are chosen.
            report: Called with a line for every event of a server.

        Raises:
            UserError: no free port.
        """
        self._report = report
        self._key = server_key(home) if commands else ""
        self._fork_server: ForkServer | None = None
        self._stopped = False
        folder = home.resolve() / "servers"
        folder.mkdir(parents=True, exist_ok=True)
        groups = together(commands)
        parts = (lease or Lease()).split([commands[group[0]].gpus for group in groups])
        part_of = {index: part for group, part in zip(groups, parts, strict=True) for index in group}
        self.servers: list[RunningServer] = []
        for index, (command, port) in enumerate(zip(commands, ports or free_ports(host, len(commands)), strict=True)):
            log = folder / f"vllm-{command.kind}-{port}.log"
            log.unlink(missing_ok=True)
            arguments = (*command.arguments, "--host", host, "--port", str(port))
            self.servers.append(RunningServer(command, local_url(port, host), log, arguments, part_of[index]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def urls(self) -> dict[str, list[str]]:
        """URLs by kind, available before the servers answer."""
        found: dict[str, list[str]] = {}
        for server in self.servers:
            found.setdefault(server.command.kind, []).append(server.url)
        return found

    def start(self, fork_server: ForkServer) -> None:
        """Start the servers, of those on the same devices the first; `tend` starts the others. Returns at once.

        Raises:
            ServerDiedError: the fork server is gone.
        """
        self._fork_server = fork_server
        for server in self.servers:
            self._start_in_turn(server)

    def tend(self) -> None:
        """Check all servers, start those whose turn it is, and restart those that ended or hang, on the same port. Call
        it about once a second.

        Raises:
            VllmServerError: a server ended before its first answer, or after the last allowed restart.
            ServerDiedError: the fork server is gone, and so are the servers.
        """
        for server in self.servers:
            if self._stopped or self._fork_server is None:
                return
            if server.child is None:
                self._start_in_turn(server)
                continue
            code = _wait(server.child, _MOMENT)
            if code is not None and not self._stopped:
                self._restart(server, code)
            elif code is None:
                self._look(server)

    def ready(self) -> bool:
        """Whether all servers have answered since their last start, as of the last `tend`."""
        return not self._stopped and all(server.answered for server in self.servers)

    def stop(self) -> None:
        """Send SIGTERM now and SIGKILL after a grace period, and prevent restarts. Returns at once."""
        self._stopped = True
        for server in self.servers:
            child = server.child
            if child is not None and child.exit_code is None:
                child.end(GRACE_SECONDS)

    @property
    def children(self) -> list[Child]:
        """The servers' processes, including those that have ended."""
        return [server.child for server in self.servers if server.child is not None]

    def close(self) -> None:
        """End all servers. Returns when all are gone; idempotent."""
        self.stop()
        deadline = time.monotonic() + GRACE_SECONDS + 2
        for server in self.servers:
            child = server.child
            if child is None:
                continue
            # If the fork server is gone, so are its children, and `_wait` has killed the rest of their groups.
            with contextlib.suppress(ServerDiedError):
                _wait(child, max(_MOMENT, deadline - time.monotonic()))
            while child.pid is not None and _group_lives(child.pid) and time.monotonic() < deadline:
                time.sleep(_MOMENT)
            server.child = None
            child.close()

    def _start_in_turn(self, server: RunningServer) -> None:
        """Start a server unless another one is starting on its devices: each measures their memory as it starts."""
        beside = [other for other in self.servers if other.lease is server.lease and other is not server]
        if any(other.child is not None and not other.answered for other in beside):
            return
        if not server.restarts:
            self._report(f"{server.label} is started; log {server.log}")
        self._start(server)

    def _start(self, server: RunningServer) -> None:
        assert self._fork_server is not None
        server.child = self._fork_server.start(
            server.log,
            command=server.arguments,
            environment={**server.command.environment, **server.lease.environment, KEY_VARIABLE: self._key},
            descriptors=server.lease.descriptors,
        )
        # A signal handler may have called `stop` since the check in `tend`.
        if self._stopped:
            server.child.end(0)

    def _look(self, server: RunningServer) -> None:
        """Check a server's health: at every call until its first answer, then periodically. End it if it hangs."""
        now = time.monotonic()
        if server.answered and now < server.looked + LOOK_SECONDS:
            return
        server.looked = now
        health = ask_health(server.url)
        if health.well:
            if not server.answered:
                self._report(f"{server.label} answers")
            server.answered, server.seen = True, now
        elif health.fault is not None:
            assert server.child is not None
            self._report(f"{server.label} is out of service ({health.fault}); it is stopped")
            server.child.end(0)
        elif server.answered and now > server.seen + HUNG_SECONDS:
            assert server.child is not None
            self._report(f"{server.label} has not answered for {now - server.seen:.0f} s; it is stopped")
            server.child.end(0)
            server.seen = now

    def _restart(self, server: RunningServer, code: int) -> None:
        assert server.child is not None
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        if not server.answered and not server.restarts:
            output = tail(server.log)
            raise VllmServerError(
                f"{server.label} {how} before it answered:\n{output}", server.log, passing=PORT_TAKEN in output.lower()
            )
        now = time.monotonic()
        server.recent = [moment for moment in server.recent if moment > now - RESTARTS_SECONDS]
        if len(server.recent) == MOST_RESTARTS:
            message = f"{server.label} {how}, after {MOST_RESTARTS} restarts; its log ends with\n{tail(server.log)}"
            raise VllmServerError(message, server.log, passing=True)
        server.recent.append(now)
        server.restarts += 1
        server.answered = False
        self._report(f"{server.label} {how}; it is restarted ({len(server.recent)} of {MOST_RESTARTS} times)")
        server.child.close()
        server.child = None
        self._start_in_turn(server)


def _wait(child: Child, seconds: float) -> int | None:
    try:
        return child.wait(seconds)
    except ServerDiedError:
        # With the fork server the kernel killed only the leader; its engine has to be ended here.
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        raise


def _group_lives(leader: int) -> bool:
    """Whether the group still has a process that is not a zombie."""
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getpgid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def free_ports(host: str, count: int, first: int | None = None, *, exact: bool = False) -> list[int]:
    """Ports on which no process listens now.

    Args:
        host: Address to listen on.
        count: Number of ports.
        first: The port to start the search at. The default is random, so that groups that choose at the same time are
            unlikely to choose the same ports.
        exact: Accept only `first` and the ports that follow it.

    Raises:
        UserError: there are no such ports.
    """
    ports: list[int] = []
    after = random.choice(PORTS) if first is None else first
    for _ in range(count):
        ports.append(choose_port(host, after, "vLLM server", exact, alone=True))
        after = ports[-1] + 1
    return ports


def tail(log: Path) -> str:
    """The cause of a server's end, from its log: the first error, or the last lines if there is none.

    The first error counts because the errors of the surrounding processes follow from it.
    """
    text = log.read_text(errors="replace") if log.exists() else ""
    error = _ERROR.search(text)
    return error.group(1) if error else "\n".join(text.splitlines()[-LAST_LINES:])
