"""Flow runs without a supervisor. Runs whose process was killed are marked as crashed, and runs that are to be
cancelled but have lost their worker are cancelled.

Prefect keeps such a run as running, and a worker cancels only runs that it started itself. The run would occupy the
only slot of its deployment, and every later run of that name would wait for ever. A run is judged only on its own
host, by its process and not by a time-out. Import this module only after Prefect's environment is set, because Prefect
reads it once.
"""

import logging
import os
import re
import signal
import stat
import time
import uuid
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psutil
from coolname.data import config as coolname_lists
from prefect import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterStateType,
    FlowRunFilterTags,
)
from prefect.client.schemas.filters import FlowRunFilterState as StateFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.runtime import flow_run
from prefect.states import Cancelled, Cancelling, Crashed, State

from base.listeners import start_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

FLOW = "mopd"
# Host, process id and the process's start in clock ticks.
PROCESS = re.compile(r"process:([^:]+):(\d+):(\d+)")
# Prefect's label of a run with the name of its worker, and its environment variable of a process with the run's id.
WORKER_LABEL, RUN_VARIABLE = "prefect.worker.name", "PREFECT__FLOW_RUN_ID"
FORM_NAME = re.compile(
    "(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi"
    r"|psi|omega)\d+"
)
WORKER_NAME = re.compile(r"mopd-(.+)-[0-9a-f]{8}")
# A restarted run still has the label and tag of its former worker for a short time.
SURE_SECONDS = 60.0
# Prefect's worker gives a process 30 s to end before it kills it.
HANDLED_SECONDS = 60.0
# Prefect stores this message with a run's state, and it is compared later: do not change it.
SIGNALLED = "no worker cancels it; its process was told to end"
GONE = "its process is gone"
logger = logging.getLogger(__name__)


def run_tags(name: str) -> list[str]:
    """Tags that identify a run and its process, so that other processes can check whether it is alive."""
    pid = os.getpid()
    return [_name_tag(name), f"process:{_host()}:{pid}:{start_of(pid)}"]


def claim_flow_run(name: str) -> None:
    """Tag this flow run with its name and process.

    A scheduled run has no such tags yet, and a retried one has those of its former process.
    """
    present = list(flow_run.tags)
    others = [tag for tag in present if tag != _name_tag(name) and not PROCESS.fullmatch(tag)]
    wanted = others + run_tags(name)
    if set(wanted) != set(present) and flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(str(flow_run.id)), tags=wanted)


def name_flow_run(title: str, name: str) -> str:
    """Rename this flow run to a title, unless a user has named it.

    Args:
        title: The distinguishing title, `NAME #NUMBER` and more.
        name: The run's name.

    Returns:
        The title; or `NAME #NUMBER` and the user's name for the run, if there is one.
    """
    own = str(flow_run.name or "")
    if own and not is_generated(own) and not own.startswith(f"{name} #"):
        return f"{title.partition(', ')[0]}, {own}"
    if flow_run.id and own != title:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(str(flow_run.id)), name=title)
    return title


def is_generated(name: str) -> bool:
    """Whether Prefect generated a run's name: two words by its server; a Greek letter, number and star by its pages."""
    first, *others = name.split("-")
    if others and FORM_NAME.fullmatch(first):
        return True
    return len(others) == 1 and {first, *others} <= _words()


@cache
def _words() -> frozenset[str]:
    """The words in the names that Prefect's server generates."""
    lists = [entry.get("words", ()) for entry in coolname_lists.values() if isinstance(entry, dict)]
    return frozenset(word for words in lists for word in words)


def outlive_worker(log: Path) -> None:
    """Redirect stdout and stderr to a file if a Prefect worker reads them through a pipe.

    When the worker ends, so does its end of the pipe, and the next output would end the run.
    """
    if RUN_VARIABLE not in os.environ:
        return
    kinds = {number: os.fstat(number).st_mode for number in (1, 2)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        for number, kind in kinds.items():
            if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
                os.dup2(file.fileno(), number)


def worker_name() -> str:
    """A new name for a Prefect worker on this host, with which its runs can be checked for a live worker."""
    return f"mopd-{_host()}-{uuid.uuid4().hex[:8]}"


def mark_crashed_runs(name: str) -> int:
    """Mark flow runs of a name as crashed if a killed process of this host left them `Running`.

    Returns:
        The number of marked runs.
    """
    with get_client(sync_client=True) as client:
        running = _read_runs(client, [StateType.RUNNING], name)
        processes = Processes()
        gone = [run for run in running if (process := RunProcess(run, processes)).is_gone and process.is_certain]
        return sum(_settle(client, run, Crashed(message=GONE)) for run in gone)


@dataclass
class CrashDetector:
    """Checks the runs of this host repeatedly, and records how long each has been in its state.

    Attributes:
        since: (state id of a run, whether its process is gone) -> time this was first seen, by the monotonic clock.
    """

    since: dict[tuple[UUID | None, bool | None], float] = field(default_factory=dict)

    def look(self) -> list[str]:
        """Check all runs of this host once.

        Returns:
            A line for each action.

        Raises:
            httpx.HTTPError: the server does not answer.
        """
        seen: set[tuple[UUID | None, bool | None]] = set()
        actions: list[str] = []
        with get_client(sync_client=True) as client:
            runs = _read_runs(client, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
            processes, now = Processes(), time.monotonic()
            for run in runs:
                process = RunProcess(run, processes)
                found = (run.state_id, process.is_gone)
                seen.add(found)
                waited = now - self.since.setdefault(found, now)
                if run.state_type == StateType.CANCELLING:
                    actions += _cancel_unattended(client, run, process, waited)
                elif process.is_gone and (process.is_certain or waited >= SURE_SECONDS):
                    actions += [f"{run.name}: {GONE}; marked as crashed"] * _settle(client, run, Crashed(message=GONE))
        self.since = {key: first for key, first in self.since.items() if key in seen}
        return actions


class Processes:
    """A snapshot of this host's processes."""

    def __init__(self) -> None:
        self._all = list(psutil.process_iter(["pid", "cmdline", "environ"]))

    def any_named(self, worker: str) -> bool:
        """Whether a worker of this name is alive."""
        return any(worker in (process.info["cmdline"] or ()) for process in self._all)

    def any_of(self, run: FlowRun) -> bool:
        """Whether a process belongs to a run. A process of another user can only be identified by its id."""
        return any(
            str(process.info["pid"]) == run.infrastructure_pid
            if process.info["environ"] is None
            else process.info["environ"].get(RUN_VARIABLE) == str(run.id)
            for process in self._all
        )


class RunProcess:
    """The process of a run, as far as this host can determine it.

    Attributes:
        pid: Id of the process, if it claimed the run on this host and is alive; else None.
        start: Start of that process, in clock ticks.
        is_gone: Whether the process is gone or will never start; None if this host cannot determine it.
        is_certain: Whether `is_gone` can be trusted at once. Otherwise only if it does not change for `SURE_SECONDS`.
    """

    def __init__(self, run: FlowRun, processes: Processes) -> None:
        self.pid: int | None = None
        self.start = 0
        self.is_gone: bool | None = None
        worker = str(run.labels.get(WORKER_LABEL, ""))
        by_us = WORKER_NAME.fullmatch(worker)
        tag = next((found for tag in run.tags if (found := PROCESS.fullmatch(tag))), None)
        host, pid, start = (tag[1], int(tag[2]), int(tag[3])) if tag else (None, 0, 0)
        # A run restarted by a worker still has the tag of its former process while it is pending.
        claimed = host == _host() and not (run.state_type == StateType.PENDING and run.deployment_id)
        self.is_certain = claimed and bool(by_us or not worker)
        if (by_us[1] if by_us else host) != _host():
            return
        if claimed and start_of(pid) == start:
            self.pid, self.start, self.is_gone = pid, start, False
        elif processes.any_of(run):
            self.is_gone = False
        elif claimed or (by_us and not processes.any_named(worker)):
            self.is_gone = True


def _cancel_unattended(client: "SyncPrefectClient", run: FlowRun, process: RunProcess, waited: float) -> list[str]:
    """Cancel a run that no worker cancels: send SIGTERM to its process once, and set `Cancelled` when it is gone.

    Returns:
        A line for each action.
    """
    if process.is_gone and (process.is_certain or waited >= SURE_SECONDS):
        return [f"{run.name}: {GONE}; cancelled"] * _settle(client, run, Cancelled(message=GONE))
    signalled = run.state is not None and run.state.message == SIGNALLED
    if process.pid is None or signalled or (_has_worker(process.pid) and waited < HANDLED_SECONDS):
        return []
    # Recorded before the signal is sent: a second signal would interrupt the shutdown that the first began.
    if not _settle(client, run, Cancelling(message=SIGNALLED)):
        return []
    try:
        if start_of(process.pid) == process.start:
            os.kill(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return []
    except PermissionError:
        return [f"{run.name}: to be cancelled, but process {process.pid} belongs to another user, who has to end it"]
    return [f"{run.name}: to be cancelled, but no worker does; process {process.pid} was sent SIGTERM"]


def _has_worker(pid: int) -> bool:
    """Whether a process is a descendant of a Prefect worker."""
    try:
        commands = [parent.cmdline() for parent in psutil.Process(pid).parents()]
    except psutil.NoSuchProcess as error:
        logger.debug("ended while it was inspected: %s", error)
        return False
    return any({"prefect", "worker", "start"} <= {Path(word).name for word in command} for command in commands)


def _read_runs(client: "SyncPrefectClient", states: list[StateType], name: str | None = None) -> list[FlowRun]:
    wanted = FlowRunFilter(
        tags=FlowRunFilterTags(all_=[_name_tag(name)]) if name else None,
        state=StateFilter(type=FlowRunFilterStateType(any_=states)),
    )
    flows = FlowFilter(name=FlowFilterName(any_=[FLOW]))
    return client.read_flow_runs(flow_filter=flows, flow_run_filter=wanted)


def _settle(client: "SyncPrefectClient", run: FlowRun, state: State[Any]) -> bool:
    """Set a run's state. False if the run was deleted or its state has changed since its process was looked for."""
    try:
        if client.read_flow_run(run.id).state_id != run.state_id:
            return False
        client.set_flow_run_state(run.id, state, force=True)
    except ObjectNotFound:
        logger.debug("%s was deleted meanwhile", run.name)
        return False
    return True


def _name_tag(name: str) -> str:
    return f"mopd:{name}"


def _host() -> str:
    return os.uname().nodename
