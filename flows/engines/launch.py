"""Starts, supervises and ends the processes of nodes.

A node runs in its own process group, forked from a warm server (`flows.engines.fork_server`), or under torchrun for
several devices. The calling thread only supervises: it forwards the journal, enforces the timeout, checks the node's
vLLM servers and turns the exit code into a readable error. A stage that runs out of memory continues once, from its
last saved state, with half of its `micro_batch_tokens`.
"""

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from base.documents import DocumentError, read_object
from base.store.checkpoint import Store
from flows.engines.devices import DeviceLeases, WaitCancelledError
from flows.engines.fork_client import Child, ForkServer, ServerDiedError, child_environment
from flows.engines.fork_server import GRACE_SECONDS
from flows.engines.journals import Journals, OnRecords
from flows.engines.process_spec import ProcessSpec
from flows.engines.threads import threads_beside, threads_of
from flows.engines.vllm_commands import Needs, devices_of, node_needs
from flows.engines.vllm_servers import VllmServerError, VllmServers
from flows.engines.worker import (
    ERROR_FILE,
    FAILED,
    INFRASTRUCTURE_FAULT,
    OUT_OF_MEMORY,
    USER_ERROR,
    exit_code_of,
)
from flows.plan.nodes import Node, StageGraph
from flows.run_file.resources import ResourcesConfig
from flows.servers.access import server_key
from stages.vllm.settings import KEY_VARIABLE

POLL_SECONDS = 0.3
LOG_FILE = "log.txt"
SERVER_LOG = "forkserver.log"
# Micro-batches differ in shape, so that fixed segments of memory would be left in pieces too small for the next ones.
ALLOCATOR = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
# The key that lowers the memory of a measurement, by stage.
_ROWS_AT_A_TIME = {"evaluate": "evaluate.batch_size", "shift": "evaluate.batch_size"}

_TORCHRUN_EXIT_CODE = re.compile(r"^ *exitcode *: (-?\d+)", re.MULTILINE)


class NodeFailedError(Exception):
    """A node's process failed.

    Attributes:
        node: Id of the node; the first one of several evaluations.
        exit_code: The process's exit code; negative for a signal.
        message: The cause, for the user.
        log: The file with the process's output and traceback.
        user_error: The user can fix the cause, so no traceback is shown.
        retryable: The cause is an infrastructure fault, so a new attempt may succeed.
    """

    def __init__(self, node: str, exit_code: int, message: str, log: Path, *, retryable: bool) -> None:
        super().__init__(f"{node}: {message}" if exit_code == USER_ERROR else f"{node}: {message} (log: {log})")
        self.node = node
        self.exit_code = exit_code
        self.message = message
        self.log = log
        self.user_error = exit_code == USER_ERROR
        self.retryable = retryable


@dataclass(frozen=True)
class _EarlyEnd:
    """The reason for ending a process early."""

    message: str
    log: Path
    retryable: bool


class Launcher:
    """Starts and supervises node processes. As a context manager it ends all of them on exit."""

    def __init__(self, home: Path, resources: ResourcesConfig) -> None:
        """Nothing is started before the first `run` or `warm_up`.

        Args:
            home: `$MOPD_HOME`.
            resources: Devices, threads and the timeout of each node.
        """
        self.home = home.resolve()
        self.store = Store(self.home)
        self.resources = resources
        self._devices = DeviceLeases()
        self._server: ForkServer | None = None
        self._starting = threading.Lock()
        self._live: dict[int, Child] = {}
        self._groups: dict[int, VllmServers] = {}
        self._stopped = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()
        with self._starting:
            if self._server is not None:
                self._server.close()
                self._server = None

    def warm_up(self) -> None:
        """Start the fork server, whose imports take seconds, before the first `run` needs it."""
        with contextlib.suppress(WaitCancelledError):
            self._running_server()

    def run(self, graph: StageGraph, nodes: Sequence[Node], on_records: OnRecords) -> None:
        """Make the nodes in one process; returns when it has ended. Several threads may call this at once.

        Args:
            graph: The graph of the nodes, whose parents must be in the store.
            nodes: One training node, or several evaluations of one checkpoint.
            on_records: Called in this thread with each node's new journal records, in order. The last call follows
                the end of the process. A resumed node's earlier records come first.

        Raises:
            NodeFailedError: the process failed, exceeded the timeout, was killed or was stopped, or its vLLM servers
                keep failing.
            UserError: the machine has fewer devices than requested; or vLLM is needed and is not installed or cannot
                serve the model.
        """
        threads = threads_of(graph, nodes[0])
        spec = ProcessSpec.of(graph, nodes, self.home, threads, self.resources.timeout_minutes)
        needs = node_needs(graph, spec.nodes[0], self.store, self.resources)
        journals = Journals(spec, self.store, on_records)
        try:
            self._run(spec, needs, journals)
        except NodeFailedError as error:
            smaller = spec.with_smaller_batches() if error.exit_code == OUT_OF_MEMORY and not self._stopped else None
            if smaller is None:
                raise
            journals.note(
                f"out of memory with micro_batch_tokens {spec.micro_batch_tokens}; continues from the last saved state "
                f"with {smaller.micro_batch_tokens}"
            )
            self._run(smaller, needs, journals)

    def _run(self, spec: ProcessSpec, needs: Needs, journals: Journals) -> None:
        """One attempt; arguments and errors as for `run`."""
        first = spec.nodes[0].id
        log = self.home / "work" / spec.nodes[0].key / LOG_FILE
        with contextlib.ExitStack() as held:
            try:
                child, servers = self._start(spec, needs, log, journals.report, held)
                early = self._supervise(spec, child, servers, journals)
            except ServerDiedError:
                message = "stopped" if self._stopped else f"its fork server ended; see {self.home / SERVER_LOG}"
                raise NodeFailedError(first, FAILED, message, log, retryable=not self._stopped) from None
            except WaitCancelledError:
                raise NodeFailedError(first, FAILED, "stopped before it started", log, retryable=False) from None
        if child.exit_code != 0:
            raise self._failure(spec, child, log, early)

    def stop_all(self) -> None:
        """End every live process group by SIGTERM, then SIGKILL, and prevent new ones. Returns when all are gone.

        Idempotent. It takes no lock, so a signal handler may call it.
        """
        self._stopped = True
        children, groups = list(self._live.values()), list(self._groups.values())
        for child in children:
            child.end(GRACE_SECONDS)
        for group in groups:
            group.stop()
            children += group.children
        deadline = time.monotonic() + GRACE_SECONDS + 2
        while time.monotonic() < deadline and any(_runs(child) for child in children):
            time.sleep(0.05)

    def _start(
        self, spec: ProcessSpec, needs: Needs, log: Path, report: Callable[[str], None], held: contextlib.ExitStack
    ) -> tuple[Child, VllmServers]:
        """Start the process and the vLLM servers of this node; `held` ends them all."""
        own = own_devices(spec, self.resources.gpus)
        theirs = devices_of(needs.commands)
        # One lease for all devices, so that two stages cannot each hold what the other waits for.
        lease, rest = self._devices.acquire(own + theirs, lambda: self._stopped).split([own, theirs])
        held.callback(rest.close)
        try:
            fork_server = self._running_server()
            servers = VllmServers(needs.commands, self.home, lease=rest, report=report)
            self._groups[id(servers)] = servers
            held.callback(self._groups.pop, id(servers))
            held.enter_context(servers)
            path = self._prepare(spec, needs, servers, log)
            servers.start(fork_server)
            environment = lease.environment | (allocator() if own else {})
            if needs.given or needs.commands:
                environment |= {KEY_VARIABLE: server_key(self.home)}
            child = fork_server.start(
                log,
                **_program(path, own if spec.training else 1),
                environment=environment,
                descriptors=lease.descriptors,
            )
        finally:
            lease.close()
        held.callback(child.close)
        self._live[id(child)] = child
        held.callback(self._live.pop, id(child))
        if self._stopped:
            child.end(0)
            servers.stop()
        return child, servers

    def _prepare(self, spec: ProcessSpec, needs: Needs, servers: VllmServers, log: Path) -> Path:
        """Write the spec file, delete the error files of an earlier attempt, and return the spec's path."""
        try:
            for node in spec.nodes:
                (self.store.work(node.key) / ERROR_FILE).unlink(missing_ok=True)
            return spec.write(self.store.work(spec.nodes[0].key), {**needs.given, **servers.urls})
        except OSError as error:
            code, message = exit_code_of(error), f"cannot be started: {error}"
            raise NodeFailedError(spec.nodes[0].id, code, message, log, retryable=False) from error

    def _running_server(self) -> ForkServer:
        with self._starting:
            if self._stopped:
                raise WaitCancelledError
            if self._server is None or not self._server.alive:
                environment = child_environment(threads_beside(self.resources)) | {"MOPD_HOME": str(self.home)}
                self._server = ForkServer(self.home / SERVER_LOG, environment)
            return self._server

    def _supervise(self, spec: ProcessSpec, child: Child, servers: VllmServers, journals: Journals) -> _EarlyEnd | None:
        """Forward the journals until the end. Returns the reason if the supervisor ended the process."""
        deadline: float | None = None
        early: _EarlyEnd | None = None
        while True:
            ended = child.wait(POLL_SECONDS) is not None
            moved = journals.forward()
            if ended:
                return early
            if child.pid is not None and (deadline is None or moved):
                deadline = time.monotonic() + self.resources.timeout_minutes * 60
            if early is None and (early := self._check(spec, servers, deadline)) is not None:
                child.end(GRACE_SECONDS)

    def _check(self, spec: ProcessSpec, servers: VllmServers, deadline: float | None) -> _EarlyEnd | None:
        """Check the servers and the deadline. Returns the reason to end the process now, if there is one."""
        try:
            servers.tend()
        except VllmServerError as error:
            return _EarlyEnd(str(error), error.log, retryable=error.passing)
        if deadline is None or time.monotonic() <= deadline:
            return None
        message = (
            f"reported nothing for longer than resources.timeout_minutes ({self.resources.timeout_minutes:g}) and was "
            f"ended"
        )
        return _EarlyEnd(message, self.home / "work" / spec.nodes[0].key / LOG_FILE, retryable=True)

    def _failure(self, spec: ProcessSpec, child: Child, log: Path, early: _EarlyEnd | None) -> NodeFailedError:
        assert child.exit_code is not None
        first, code = spec.nodes[0].id, child.exit_code
        if self._stopped:
            return NodeFailedError(first, code, "stopped", log, retryable=False)
        if early is not None:
            return NodeFailedError(first, code, early.message, early.log, retryable=early.retryable)
        reported = _read_error(self.store.work(spec.nodes[0].key) / ERROR_FILE)
        if code == FAILED:
            # torchrun exits with 1 for every exit code of its workers.
            code = reported["exit_code"] if reported else _reported_by_torchrun(log)
        if code < 0:
            return NodeFailedError(first, code, f"its process was killed by signal {-code}", log, retryable=True)
        message = reported["message"] if reported else _last_line(log)
        if code == OUT_OF_MEMORY:
            message += f"; {_smaller(spec)}"
        return NodeFailedError(first, code, message, log, retryable=code == INFRASTRUCTURE_FAULT)


def own_devices(spec: ProcessSpec, gpus: int) -> int:
    """The devices of a node's process, of a run's `resources.gpus`: all if it trains or runs a program, one if it
    measures on one."""
    return gpus if spec.training or spec.launches else min(int(spec.on_device), gpus)


def allocator() -> dict[str, str]:
    """The setting of torch's allocator on a device, unless the user's environment has one."""
    return {} if any(name in os.environ for name in ALLOCATOR_VARIABLES) else ALLOCATOR


def _smaller(spec: ProcessSpec) -> str:
    """How to use less memory, for a message."""
    if spec.training:
        return (
            f"lower micro_batch_tokens (now {spec.micro_batch_tokens}), which restarts nothing, or use "
            f"gradient_checkpointing"
        )
    stage = spec.nodes[0].stage
    return f"lower {_ROWS_AT_A_TIME[stage]}" if stage in _ROWS_AT_A_TIME else "use a machine with more memory"


def _program(spec: Path, devices: int) -> dict[str, Any]:
    """Arguments of `ForkServer.start`: the spec itself, or torchrun for several devices."""
    if devices <= 1:
        return {"spec": spec}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    return {"command": [*torchrun, "-m", "flows.engines.worker", str(spec)]}


def _runs(child: Child) -> bool:
    # A child without a pid has not been read from yet; its exit code will still be delivered.
    return child.exit_code is None and (child.pid is None or psutil.pid_exists(child.pid))


def _read_error(path: Path) -> dict[str, Any] | None:
    try:
        return read_object(path)
    except (FileNotFoundError, DocumentError):
        # The process was killed before or while it wrote the file; its log is read instead.
        return None


def _reported_by_torchrun(log: Path) -> int:
    """The exit code of the first worker that failed, from torchrun's report; 1 if the log has no report."""
    codes = _TORCHRUN_EXIT_CODE.findall(_text(log))
    return int(codes[-1]) if codes else FAILED


def _last_line(log: Path) -> str:
    """The last line of a process's log, for a process that could not write its error file."""
    return next((line for line in reversed(_text(log).split("\n")) if line.strip()), "exited without output")


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
