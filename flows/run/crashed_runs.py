"""Flow runs that nobody sees to any more: those whose process is gone without a word are marked as crashed, and those
to be cancelled whose worker is gone are cancelled.

Prefect goes on believing that such a run is running, and its worker cancels only what it started itself: the run keeps
the one place of its deployment, and every later run of that name would wait for ever. A run is judged on its own host
alone, by its process and never by a clock. Import this module only after Prefect's environment is set, for it is read
once.
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
# HOST, process id, and its start in clock ticks.
PROCESS = re.compile(r"process:([^:]+):(\d+):(\d+)")
# What Prefect calls a worker in the labels of the runs it began, and a run in the environment of its process.
WORKER_LABEL, RUN_VARIABLE = "prefect.worker.name", "PREFECT__FLOW_RUN_ID"
FORM_NAME = re.compile(
    "(alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|upsilon|phi|chi"
    r"|psi|omega)\d+"
)
WORKER_NAME = re.compile(r"mopd-(.+)-[0-9a-f]{8}")
# A run that is begun again bears the marks of its former worker for a moment.
SURE_SECONDS = 60.0
# Prefect's worker gives a process thirty seconds to end, and then kills it.
HANDLED_SECONDS = 60.0
TOLD = "no worker cancels it; its process was told to end"
GONE = "its process is gone"
logger = logging.getLogger(__name__)


def run_tags(name: str) -> list[str]:
    """Tags by which others find a run and see whether its process still lives."""
    pid = os.getpid()
    return [_name_tag(name), f"process:{_host()}:{pid}:{start_of(pid)}"]


def claim_flow_run(name: str) -> None:
    """Tag this flow run with its name and process, as a scheduled one is not yet, and a retried one with its former."""
    present = list(flow_run.tags)
    others = [tag for tag in present if tag != _name_tag(name) and not PROCESS.fullmatch(tag)]
    wanted = others + run_tags(name)
    if set(wanted) != set(present) and flow_run.id:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(str(flow_run.id)), tags=wanted)


def name_flow_run(title: str, name: str) -> str:
    """Call this flow run by a title, unless a person has named it.

    Args:
        title: What tells it from the others, `NAME #NUMBER` and more.
        name: The run's name.

    Returns:
        The title; `NAME #NUMBER` and the person's own name where there is one.
    """
    own = str(flow_run.name or "")
    if own and not is_generated(own) and not own.startswith(f"{name} #"):
        return f"{title.partition(', ')[0]}, {own}"
    if flow_run.id and own != title:
        with get_client(sync_client=True) as client:
            client.update_flow_run(UUID(str(flow_run.id)), name=title)
    return title


def is_generated(name: str) -> bool:
    """Whether Prefect made a run's name up: its server two words, its pages a Greek letter with a number and a star."""
    first, *others = name.split("-")
    if others and FORM_NAME.fullmatch(first):
        return True
    return len(others) == 1 and {first, *others} <= _words()


@cache
def _words() -> frozenset[str]:
    """The words of the names that Prefect's server makes up."""
    lists = [entry.get("words", ()) for entry in coolname_lists.values() if isinstance(entry, dict)]
    return frozenset(word for words in lists for word in words)


def outlive_worker(log: Path) -> None:
    """Let what this process says go to a file, where a worker of Prefect reads it: with the worker goes its end of the
    pipe, and the next word would end the run."""
    if RUN_VARIABLE not in os.environ:
        return
    kinds = {number: os.fstat(number).st_mode for number in (1, 2)}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        for number, kind in kinds.items():
            if stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind):
                os.dup2(file.fileno(), number)


def worker_name() -> str:
    """A new name for a worker of Prefect on this host, by which its runs know whether it still lives."""
    return f"mopd-{_host()}-{uuid.uuid4().hex[:8]}"


def mark_crashed_runs(name: str) -> int:
    """Mark the flow runs of a name as crashed that a killed process of this host left `Running`.

    Returns:
        How many there were.
    """
    with get_client(sync_client=True) as client:
        running = _read_runs(client, [StateType.RUNNING], name)
        processes = Processes()
        gone = [run for run in running if (place := RunProcess(run, processes)).is_gone and place.is_certain]
        return sum(_settle(client, run, Crashed(message=GONE)) for run in gone)


@dataclass
class CrashDetector:
    """Looks again and again at the runs of this host, and remembers how long each has been as it is.

    Attributes:
        since: State of a run, and whether its process was gone -> when that was first seen, by the monotonic clock.
    """

    since: dict[tuple[UUID | None, bool | None], float] = field(default_factory=dict)

    def look(self) -> list[str]:
        """Look once.

        Returns:
            What was done, a line each.

        Raises:
            httpx.HTTPError: the server does not answer.
        """
        seen: set[tuple[UUID | None, bool | None]] = set()
        said: list[str] = []
        with get_client(sync_client=True) as client:
            runs = _read_runs(client, [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
            processes, now = Processes(), time.monotonic()
            for run in runs:
                place = RunProcess(run, processes)
                found = (run.state_id, place.is_gone)
                seen.add(found)
                waited = now - self.since.setdefault(found, now)
                if run.state_type == StateType.CANCELLING:
                    said += _see_to_cancelling(client, run, place, waited)
                elif place.is_gone and (place.is_certain or waited >= SURE_SECONDS):
                    said += [f"{run.name}: {GONE}; marked as crashed"] * _settle(client, run, Crashed(message=GONE))
        self.since = {key: first for key, first in self.since.items() if key in seen}
        return said


class Processes:
    """The processes of this host at one moment."""

    def __init__(self) -> None:
        self._all = list(psutil.process_iter(["pid", "cmdline", "environ"]))

    def any_named(self, worker: str) -> bool:
        """Whether a worker of this name lives."""
        return any(worker in (process.info["cmdline"] or ()) for process in self._all)

    def any_of(self, run: FlowRun) -> bool:
        """Whether a process belongs to a run; one of another user is known by its id alone."""
        return any(
            str(process.info["pid"]) == run.infrastructure_pid
            if process.info["environ"] is None
            else process.info["environ"].get(RUN_VARIABLE) == str(run.id)
            for process in self._all
        )


class RunProcess:
    """Where a run is, as far as this host knows.

    Attributes:
        pid: Of its process, if that claimed the run on this host and lives; with its start.
        is_gone: Whether its process is gone, or will never come; None where this host cannot know.
        is_certain: Whether that is so at once, and not only if it stays so.
    """

    def __init__(self, run: FlowRun, processes: Processes) -> None:
        self.pid: int | None = None
        self.start = 0
        self.is_gone: bool | None = None
        worker = str(run.labels.get(WORKER_LABEL, ""))
        by_us = WORKER_NAME.fullmatch(worker)
        tag = next((found for tag in run.tags if (found := PROCESS.fullmatch(tag))), None)
        host, pid, start = (tag[1], int(tag[2]), int(tag[3])) if tag else (None, 0, 0)
        # Begun again by a worker, it still bears the tag of the process before.
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


def _see_to_cancelling(client: "SyncPrefectClient", run: FlowRun, place: RunProcess, waited: float) -> list[str]:
    """Cancel a run that no worker cancels: its process is told to end once, and when it is gone Prefect is told."""
    if place.is_gone and (place.is_certain or waited >= SURE_SECONDS):
        return [f"{run.name}: {GONE}; cancelled"] * _settle(client, run, Cancelled(message=GONE))
    told = run.state is not None and run.state.message == TOLD
    if place.pid is None or told or (_has_worker(place.pid) and waited < HANDLED_SECONDS):
        return []
    # Said before it is done: a second signal would break off the end that the first began.
    if not _settle(client, run, Cancelling(message=TOLD)):
        return []
    try:
        if start_of(place.pid) == place.start:
            os.kill(place.pid, signal.SIGTERM)
    except ProcessLookupError:
        return []
    except PermissionError:
        return [f"{run.name}: to be cancelled, but process {place.pid} is another user's; end it there"]
    return [f"{run.name}: to be cancelled, and no worker does; process {place.pid} was told to end"]


def _has_worker(pid: int) -> bool:
    """Whether a process stands below a worker of Prefect."""
    try:
        commands = [parent.cmdline() for parent in psutil.Process(pid).parents()]
    except psutil.NoSuchProcess as error:
        logger.debug("ended while it was looked at: %s", error)
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
    """Set a run's state; says whether the run was still there, and still as it was when its process was looked for."""
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
