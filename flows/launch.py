"""How a node's process starts, is watched and is ended.

A node runs in its own process group, forked from a warm server (`flows.forkserver`), or under torchrun for several
devices. The thread that asked for it only supervises: it forwards the journal, enforces the timeout and turns the
exit code into an error for people.
"""

import json
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from experts.domain import stable_hash
from flows.children import Child, ForkServer, ServerDiedError, child_environment
from flows.config import ResourcesConfig
from flows.devices import DeviceLeases, WaitCancelledError
from flows.forkserver import GRACE_SECONDS
from flows.lock import code_fingerprint
from flows.plan import VERSIONS, Node, StageGraph
from flows.worker import ERROR_FILE, FAILED, INFRASTRUCTURE_FAULT, USER_ERROR, exit_code_of
from stages.core.checkpoint import Store, write_whole
from stages.core.journal import JOURNAL_FILE, JournalReader

POLL_SECONDS = 0.3
LOG_FILE = "log.txt"
SERVER_LOG = "forkserver.log"

_TORCHRUN_EXIT_CODE = re.compile(r"^ *exitcode *: (-?\d+)", re.MULTILINE)

OnRecords = Callable[[Node, list[dict[str, Any]]], None]


class NodeFailedError(Exception):
    """A node's process did not do its work.

    Attributes:
        node: Id of the node (of several evaluations, the first).
        exit_code: The process's exit code; negative for a signal.
        message: What went wrong, for people.
        log: The file with its output and traceback.
        user_error: The user can mend it; no traceback is of use.
        retryable: An infrastructure fault: a new attempt may succeed.
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
class Job:
    """The nodes that one process makes, with what the worker must know of them.

    Attributes:
        nodes: One training node, or several evaluations of one checkpoint.
        spec: The contents of the spec file.
    """

    nodes: tuple[Node, ...]
    spec: Mapping[str, Any]

    @classmethod
    def of(cls, graph: StageGraph, nodes: Sequence[Node], home: Path, threads: int) -> Self:
        """Write down what a process needs to make `nodes`.

        Raises:
            ValueError: nodes that cannot share a process.
        """
        kinds = {(node.stage, node.parents.get("checkpoint")) for node in nodes}
        if len(kinds) != 1 or (len(nodes) > 1 and nodes[0].stage != "evaluate"):
            raise ValueError("one process makes one training node or evaluations of one checkpoint")
        spec = {"home": str(home), "threads": threads, "nodes": [_node_spec(graph, node) for node in nodes]}
        return cls(tuple(nodes), spec)

    @property
    def training(self) -> bool:
        """Whether it may use several devices."""
        return self.nodes[0].stage not in ("load", "evaluate")

    def write(self, folder: Path) -> Path:
        """Write the spec file; the same spec gets the same name, so that repeated runs leave one file."""
        path = folder / f"spec-{stable_hash(self.spec)[:12]}.json"
        write_whole(path, json.dumps(self.spec, indent=1))
        return path


class Launcher:
    """Starts and supervises node processes; as a context manager it leaves none behind."""

    def __init__(self, home: Path, resources: ResourcesConfig) -> None:
        """Nothing is started before the first `run`.

        Args:
            home: `$MOPD_HOME`.
            resources: Devices, threads and the timeout of each node.
        """
        self.home = home.resolve()
        self.store = Store(self.home)
        self.resources = resources
        self._devices = DeviceLeases(self.home)
        self._server: ForkServer | None = None
        self._starting = threading.Lock()
        self._live: dict[int, Child] = {}
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

    def run(self, graph: StageGraph, nodes: Sequence[Node], on_records: OnRecords) -> None:
        """Make the nodes in one process; returns when it has ended. Several threads may call this at once.

        Args:
            graph: The graph the nodes are of; their parents must stand in the store.
            nodes: One training node, or several evaluations of one checkpoint.
            on_records: Called in this thread with each node's new journal records, in order; the last call comes
                after the end. A resumed node's earlier records come first.

        Raises:
            NodeFailedError: the process failed, took longer than the timeout, was killed or was stopped.
            UserError: fewer devices than asked for.
        """
        job = Job.of(graph, nodes, self.home, self.resources.threads)
        first = job.nodes[0].id
        log = self.home / "work" / job.nodes[0].key / LOG_FILE
        try:
            spec = self._prepare(job)
        except OSError as error:
            code = exit_code_of(error)
            raise NodeFailedError(first, code, f"cannot be started: {error}", log, retryable=False) from error
        child: Child | None = None
        try:
            child = self._start(job, spec, log)
            self._live[id(child)] = child
            if self._stopped:
                child.end(0)
            timed_out = self._supervise(job, child, on_records)
        except ServerDiedError:
            message = "stopped" if self._stopped else f"its fork server ended; see {self.home / SERVER_LOG}"
            raise NodeFailedError(first, FAILED, message, log, retryable=not self._stopped) from None
        except WaitCancelledError:
            raise NodeFailedError(first, FAILED, "stopped before it started", log, retryable=False) from None
        finally:
            if child is not None:
                self._live.pop(id(child), None)
                child.close()
        if child.exit_code != 0:
            raise self._failure(job, child, log, timed_out)

    def stop_all(self) -> None:
        """End every live process group, SIGTERM then SIGKILL, and let no new one start. Returns when all are gone.

        Idempotent; takes no lock, so that a signal handler may call it.
        """
        self._stopped = True
        children = list(self._live.values())
        for child in children:
            child.end(GRACE_SECONDS)
        deadline = time.monotonic() + GRACE_SECONDS + 2
        while time.monotonic() < deadline and any(_runs(child) for child in children):
            time.sleep(0.05)

    def _prepare(self, job: Job) -> Path:
        """Write the spec and clear what an earlier attempt said."""
        for node in job.nodes:
            (self.store.work(node.key) / ERROR_FILE).unlink(missing_ok=True)
        return job.write(self.store.work(job.nodes[0].key))

    def _start(self, job: Job, spec: Path, log: Path) -> Child:
        gpus = self.resources.gpus if job.training else min(1, self.resources.gpus)
        lease = self._devices.acquire(gpus, lambda: self._stopped)
        try:
            server = self._running_server()
            if gpus <= 1:
                return server.start(log, spec=spec, environment=lease.environment, descriptors=lease.descriptors)
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"]
            command += ["-m", "flows.worker", str(spec)]
            return server.start(log, command=command, environment=lease.environment, descriptors=lease.descriptors)
        finally:
            lease.close()

    def _running_server(self) -> ForkServer:
        with self._starting:
            if self._stopped:
                raise WaitCancelledError
            if self._server is None or not self._server.alive:
                environment = child_environment(self.resources.threads) | {"MOPD_HOME": str(self.home)}
                self._server = ForkServer(self.home / SERVER_LOG, environment)
            return self._server

    def _supervise(self, job: Job, child: Child, on_records: OnRecords) -> bool:
        """Forward the journals until the end; says whether the timeout ended it.

        The clock starts with the process; time in which it waits for another run's lock counts.
        """
        readers = [(node, JournalReader(self.store.work(node.key) / JOURNAL_FILE)) for node in job.nodes]
        deadline: float | None = None
        timed_out = False
        while True:
            ended = child.wait(POLL_SECONDS) is not None
            for node, reader in readers:
                if records := reader.new_records():
                    on_records(node, records)
            if ended:
                return timed_out
            if child.pid is not None and deadline is None:
                deadline = time.monotonic() + self.resources.timeout_minutes * 60
            if deadline is not None and not timed_out and time.monotonic() > deadline:
                timed_out = True
                child.end(GRACE_SECONDS)

    def _failure(self, job: Job, child: Child, log: Path, timed_out: bool) -> NodeFailedError:
        assert child.exit_code is not None
        first, code = job.nodes[0].id, child.exit_code
        if self._stopped:
            return NodeFailedError(first, code, "stopped", log, retryable=False)
        if timed_out:
            message = f"took longer than resources.timeout_minutes ({self.resources.timeout_minutes:g}) and was ended"
            return NodeFailedError(first, code, message, log, retryable=False)
        said = _read_error(self.store.work(job.nodes[0].key) / ERROR_FILE)
        if code == FAILED:
            # torchrun's own exit code is 1 whatever its workers' are.
            code = said["exit_code"] if said else _reported_by_torchrun(log)
        if code < 0:
            return NodeFailedError(first, code, f"its process was killed by signal {-code}", log, retryable=True)
        message = said["message"] if said else _last_line(log)
        return NodeFailedError(first, code, message, log, retryable=code == INFRASTRUCTURE_FAULT)


def _node_spec(graph: StageGraph, node: Node) -> dict[str, Any]:
    provenance = {
        "stage": node.stage,
        "version": VERSIONS[node.stage],
        "config": node.config,
        "ingredients": node.ingredients,
        "code": code_fingerprint(),
        "node": node.id,
    }
    return {
        "name": node.name,
        "stage": node.stage,
        "key": node.key,
        "seed": node.seed,
        "config": node.config,
        "parents": {role: graph.node(parent).key for role, parent in node.parents.items()},
        "domains": node.domains,
        "provenance": provenance,
    }


def _runs(child: Child) -> bool:
    return child.exit_code is None and child.pid is not None and psutil.pid_exists(child.pid)


def _read_error(path: Path) -> dict[str, Any] | None:
    try:
        said: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return said


def _reported_by_torchrun(log: Path) -> int:
    """The exit code of the first worker that failed, from torchrun's report; 1 where there is none."""
    codes = _TORCHRUN_EXIT_CODE.findall(_text(log))
    return int(codes[-1]) if codes else FAILED


def _last_line(log: Path) -> str:
    """What a process that could not write its error said last."""
    return next((line for line in reversed(_text(log).split("\n")) if line.strip()), "ended without a word")


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""
