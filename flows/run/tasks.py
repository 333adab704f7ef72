"""Prefect's tasks: one for each training node, and one for each kind of evaluation of a checkpoint.

A task looks up its artifacts in the store, launches a process for the missing ones, and forwards its journal. Only
infrastructure faults are retried. Finished work is recorded by the store, not by Prefect.
"""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

import httpx
from prefect import Task, get_run_logger, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.exceptions import PrefectException
from prefect.states import Completed, State
from prefect.tasks import exponential_backoff

from base.store.checkpoint import Store
from flows.engines.launch import LOG_FILE, Launcher, NodeFailedError
from flows.plan.nodes import Node, StageGraph
from flows.run.progress import Meter, ProgressDisplay, duration, notes
from stages.config.kinds import EVALUATIONS

if TYPE_CHECKING:
    from flows.tracking.tracker import StageRun, Tracker

ARTIFACT_SECONDS = 2.0
RETRY_SECONDS, RETRY_JITTER = 5.0, 0.5


@dataclass(frozen=True)
class TaskGroup:
    """The nodes of one task, a job: a training node, or the evaluations of one kind of one checkpoint.

    Attributes:
        id: The node's id, or `eval/CHECKPOINT`, `harness/CHECKPOINT`.
        nodes: The nodes, in the graph's order.
        parents: Ids of the jobs whose artifacts it needs.
    """

    id: str
    nodes: tuple[Node, ...]
    parents: tuple[str, ...]

    @property
    def training(self) -> bool:
        """Whether it makes a checkpoint."""
        return self.nodes[0].stage not in EVALUATIONS


@dataclass
class Supervisor:
    """Runs jobs, each in one thread, and reports them to the tracker and the display.

    Attributes:
        graph: The run.
        store: The store of its artifacts.
        launcher: Starts the nodes' processes.
        tracker: Records every node.
        display: Shows every job.
        stopping: Set when the run is being stopped from outside; failures after that are recorded as `KILLED`.
    """

    graph: StageGraph
    store: Store
    launcher: Launcher
    tracker: "Tracker"
    display: ProgressDisplay
    stopping: bool = False

    def make(self, job: TaskGroup) -> State[None]:
        """Make the missing artifacts of a job.

        Returns:
            Completed, with the name `Cached` if nothing was missing.

        Raises:
            NodeFailedError: its process failed.
            UserError: a cached artifact is corrupted, or there are too few devices.
        """
        missing = self._missing(job)
        if not missing:
            return Completed(name="Cached", message="in the store")
        seconds = self._launch(job, missing)
        return Completed(message=f"made in {duration(seconds)}")

    def _missing(self, job: TaskGroup) -> list[Node]:
        """The nodes that are not in the store. The artifacts of the others are verified and linked in the tracker."""
        missing = []
        for node in job.nodes:
            if self.store.find(node.key) is None:
                missing.append(node)
            else:
                self.tracker.stage_cached(node, self.store.get(node.key))
        return missing

    def _launch(self, job: TaskGroup, nodes: Sequence[Node]) -> float:
        runs = {node.id: self.tracker.stage_started(node) for node in nodes}
        meter, page, log, since = Meter(job.id, nodes), ProgressPage(job.id), get_run_logger(), time.time()
        self.display.started(meter)
        log.info("%s: launched, log %s", job.id, self.store.work(nodes[0].key) / LOG_FILE)

        def on_records(node: Node, records: list[dict[str, Any]]) -> None:
            runs[node.id].forward(records)
            for line in notes(node, records, since):
                self.display.print_line(line)
                log.info("%s", line)
            meter.read(node, records)
            self.display.moved(meter)
            if page.show(meter):
                log.info("%s: %s", job.id, meter.line())

        started = time.monotonic()
        try:
            self.launcher.run(self.graph, nodes, on_records)
        except Exception:
            self._ended_badly(nodes, runs)
            self.display.finished(meter, "stopped" if self.stopping else "failed")
            raise
        for node in nodes:
            runs[node.id].finish("FINISHED", self.store.get(node.key))
        seconds = time.monotonic() - started
        meter.complete()
        if meter.stopped_early:
            page.show(meter)
        outcome = [f"done in {duration(seconds)}", meter.stopped_early, meter.measure]
        self.display.finished(meter, ", ".join(part for part in outcome if part))
        return seconds

    def _ended_badly(self, nodes: Sequence[Node], runs: Mapping[str, "StageRun"]) -> None:
        """Close the tracker's runs as failed or killed, except for evaluations that finished."""
        for node in nodes:
            artifact = self.store.find(node.key)
            if artifact is not None:
                runs[node.id].finish("FINISHED", artifact)
            else:
                runs[node.id].finish("KILLED" if self.stopping else "FAILED", None)


class ProgressPage:
    """A job's progress bar in Prefect's pages, updated at most every `ARTIFACT_SECONDS`.

    If the server cannot be reached, the bar stops and the job continues.
    """

    def __init__(self, job_id: str) -> None:
        self._key = artifact_key(f"progress-{job_id}")
        self._label = job_id
        self._artifact: UUID | None = None
        self._last = 0.0
        self._lost = False

    def show(self, meter: Meter) -> bool:
        """Update the bar if an update is due. Returns whether it was due."""
        now = time.monotonic()
        if self._lost or (now - self._last < ARTIFACT_SECONDS and meter.share < 1):
            return False
        self._last = now
        percent, text = 100 * meter.share, f"{self._label}: {meter.line()}"
        try:
            if self._artifact is None:
                self._artifact = cast(UUID, create_progress_artifact(percent, key=self._key, description=text))
            else:
                update_progress_artifact(self._artifact, percent, description=text)
        except (httpx.HTTPError, PrefectException) as error:
            self._lost = True
            get_run_logger().warning("progress is no longer shown here: %s", error)
        return True


def artifact_key(text: str) -> str:
    """A text as a valid key of a Prefect artifact: lowercase letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def task_of(supervisor: Supervisor, job: TaskGroup, retries: int) -> "Task[[], State[None]]":
    """A job as a Prefect task that retries infrastructure faults only."""

    @task(
        name=job.nodes[0].stage,
        task_run_name=job.id.replace("{", "(").replace("}", ")"),
        retries=retries,
        # The delay doubles each time; the jitter keeps jobs from retrying at the same moment.
        retry_delay_seconds=exponential_backoff(RETRY_SECONDS),
        retry_jitter_factor=RETRY_JITTER,
        retry_condition_fn=_is_retryable,
        cache_policy=NO_CACHE,
        persist_result=False,
    )
    def make() -> State[None]:
        return supervisor.make(job)

    return make


def _is_retryable(task_: Any, run: Any, state: State[Any]) -> bool:
    del task_, run
    error = state.result(raise_on_failure=False)
    return isinstance(error, NodeFailedError) and error.retryable
