"""A process that imports torch and the stages once and forks one child per job.

The client (`flows.engines.fork_client`) sends requests over a socket and passes, for each job, one end of a further
socket. On that socket the server reports the child's pid and exit code and receives the request to end it. If the
job's socket closes, the supervisor is gone and the server ends the child's group. If the server dies, the kernel kills
its children. So no process outlives the main process, however that died. The children of multiprocessing's fork server
keep their server alive, re-import the caller's `__main__` and share its environment; hence this implementation.
"""

import contextlib
import gc
import json
import logging
import math
import os
import select
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from base.processes import die_with_parent
from flows.engines.preload import preload
from flows.engines.worker import DISK_FAULT, run_spec

GRACE_SECONDS = 10.0
MESSAGE_BYTES = 65536
_MOST_DESCRIPTORS = 64
_log = logging.getLogger("flows.engines.fork_server")


@dataclass(eq=False)
class _Running:
    """The server's record of one child; `kill_at` is the time of its SIGKILL, by the monotonic clock."""

    pid: int
    pidfd: int
    supervisor: socket.socket
    kill_at: float = math.inf


class _Server:
    """The event loop: one thread and one selector for requests, supervisors' messages and the ends of children."""

    def __init__(self, control: socket.socket) -> None:
        self._control = control
        self._selector = selectors.DefaultSelector()
        self._selector.register(control, selectors.EVENT_READ)
        self._children: dict[int, _Running] = {}
        self._open = True

    def serve(self) -> dict[str, Any] | None:
        """Serve until the client is gone and every child has ended.

        Returns:
            In a child: the request it was forked for. In the server: None, at the end.
        """
        while self._open or self._children:
            for key, _ in self._selector.select(self._select_timeout()):
                if key.fileobj is self._control:
                    request = self._take_request()
                    if request is not None:
                        return request
                elif key.data.pid not in self._children:
                    continue
                elif key.fd == key.data.pidfd:
                    self._report_end(key.data)
                else:
                    self._read_supervisor(key.data)
            for child in self._children.values():
                if child.kill_at <= time.monotonic():
                    os.killpg(child.pid, signal.SIGKILL)
                    child.kill_at = math.inf
        return None

    def _select_timeout(self) -> float | None:
        """Seconds until the next SIGKILL is due; None if none is."""
        soonest = min((child.kill_at for child in self._children.values()), default=math.inf)
        return None if soonest == math.inf else max(0.0, soonest - time.monotonic())

    def _take_request(self) -> dict[str, Any] | None:
        message, descriptors, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, _MOST_DESCRIPTORS)
        if not message:
            self._selector.unregister(self._control)
            self._open = False
            for child in self._children.values():
                _end(child, GRACE_SECONDS)
            return None
        server = os.getpid()
        supervisor = socket.socket(fileno=descriptors[0])
        try:
            pid = os.fork()
        except OSError as error:
            # No memory or no process id for this job. Its closed socket notifies the supervisor; other jobs go on.
            _log.error("cannot fork: %s", error)
            for descriptor in (supervisor.detach(), *descriptors[1:]):
                os.close(descriptor)
            return None
        if pid == 0:
            os.setpgid(0, 0)
            die_with_parent(server)
            supervisor.close()
            self._close_in_child()
            request: dict[str, Any] = json.loads(message)
            return request | {"descriptors": descriptors[1:]}
        # Both the child and the server set the group, so that it exists before any signal is sent to it.
        with contextlib.suppress(PermissionError, ProcessLookupError):
            os.setpgid(pid, pid)
        for descriptor in descriptors[1:]:
            os.close(descriptor)
        child = _Running(pid, os.pidfd_open(pid), supervisor)
        self._children[pid] = child
        self._selector.register(child.pidfd, selectors.EVENT_READ, child)
        self._selector.register(supervisor, selectors.EVENT_READ, child)
        _report(child, {"pid": pid})
        return None

    def _close_in_child(self) -> None:
        """Close the server's descriptors in a new child, so that each end of a socket has one owner."""
        for child in self._children.values():
            child.supervisor.close()
            os.close(child.pidfd)
        self._selector.close()
        self._control.close()

    def _read_supervisor(self, child: _Running) -> None:
        try:
            message = child.supervisor.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            message = b""
        if not message:
            self._selector.unregister(child.supervisor)
        _end(child, json.loads(message)["grace"] if message else GRACE_SECONDS)

    def _report_end(self, child: _Running) -> None:
        # The rest of the group is killed before the leader is reaped: until then its group id cannot be reused.
        os.killpg(child.pid, signal.SIGKILL)
        _, status = os.waitpid(child.pid, 0)
        del self._children[child.pid]
        for registered in (child.pidfd, child.supervisor):
            if registered in self._selector.get_map():
                self._selector.unregister(registered)
        os.close(child.pidfd)
        _report(child, {"exit_code": os.waitstatus_to_exitcode(status)})
        child.supervisor.close()


def _end(child: _Running, grace: float) -> None:
    os.killpg(child.pid, signal.SIGTERM)
    child.kill_at = min(child.kill_at, time.monotonic() + grace)


def _report(child: _Running, report: Mapping[str, int]) -> None:
    # The selector notices a dead supervisor by the end of its socket.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        child.supervisor.send(json.dumps(report).encode())


@contextlib.contextmanager
def _ended_with_client(control: socket.socket) -> Iterator[None]:
    """End this process if the client disconnects inside the block. The watching thread ends before the first fork."""
    over, wake = os.pipe()
    poll = select.poll()
    poll.register(control, select.POLLRDHUP)
    poll.register(over, select.POLLHUP)

    def watch() -> None:
        if any(descriptor == control.fileno() for descriptor, _ in poll.poll()):
            os._exit(0)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        os.close(wake)
        thread.join()
        os.close(over)


def _become(request: Mapping[str, Any]) -> int:
    """Run the request in a new child; returns its exit code unless a command replaces the process."""
    try:
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        _log.error("cannot open %s: %s", request["log"], error)
        return DISK_FAULT
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.environ.update(request["environment"])
    if request["command"]:
        for descriptor in request["descriptors"]:
            os.set_inheritable(descriptor, True)
        os.execvp(request["command"][0], request["command"])
    return run_spec(Path(request["spec"]))


def main(modules: Sequence[str]) -> int:
    """Serve on standard input, which is a socket. A forked child leaves the loop with its request.

    Args:
        modules: Modules to import first.
    """
    logging.basicConfig(format="%(asctime)s %(message)s")
    control = socket.socket(fileno=os.dup(0))
    # What the imports make lives on, so collections would only take time.
    gc.disable()
    with _ended_with_client(control):
        preload(modules)
    # Without this, garbage collection in a child would write to the shared pages and so copy them.
    gc.freeze()
    gc.enable()
    request = _Server(control).serve()
    return 0 if request is None else _become(request)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
