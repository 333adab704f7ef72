"""The pipeline as a Prefect flow: makes the nodes of a run's graph, compares the checkpoints and writes the report.

Import this module only inside `flows.run.session.prefect_session`, because Prefect reads its environment only once.
"""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
from filelock import Timeout
from prefect import flow, get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import TagsContext
from prefect.exceptions import PrefectException
from prefect.runtime import flow_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL
from prefect.states import Cancelled, Failed, State
from rich.console import Console

from base.errors import UserError
from base.signals import interruptible
from base.store.checkpoint import Store
from flows.champion.notify import notify, queue_notifications, send_notifications
from flows.check.check import deep_check
from flows.engines.launch import Launcher
from flows.plan.graph import build_graph
from flows.plan.lock import write_lock
from flows.run.crashed_runs import FLOW, RUN_VARIABLE, claim_flow_run, mark_crashed_runs, name_flow_run, outlive_worker
from flows.run.finish import Outcome, finish_run
from flows.run.last_run import remember
from flows.run.progress import ProgressDisplay
from flows.run.schedule import Future, jobs_of, schedule_jobs
from flows.run.starts import Start, begin, killed_starts, planned_experts, run_title
from flows.run.tasks import Supervisor, TaskGroup, artifact_key, task_of
from flows.run_file.load import load_run_file
from flows.run_file.parameters import CAP, as_lines, form_overrides
from flows.run_file.schema import RunConfig
from flows.servers.pages import saved_pages
from flows.servers.start import prefect_run_page, without_secrets
from flows.tracking.gc import plan_lock
from flows.tracking.tracker import Tracker

OUTPUT_FILE = "output.log"
_ending: Outcome | State[Any] | Exception | None = None
_start: Start | None = None


class PipelineFailedError(Exception):
    """Some nodes failed. All nodes that do not depend on them are in the store.

    Attributes:
        failures: Job id -> the error that ended it.
        not_started: Ids of the jobs that depend on a failed one.
    """

    def __init__(self, failures: Mapping[str, Exception], not_started: Sequence[str]) -> None:
        lines = [str(error) for error in failures.values()]
        if not_started:
            lines.append(f"not started: {', '.join(not_started)}")
        super().__init__("\n".join(lines))
        self.failures = failures
        self.not_started = not_started


def _recorded(flow: Any, flow_run: Any, state: State[Any]) -> None:
    """Close the start: the end of the flow run is recorded, so a later start does not have to record it."""
    del flow, flow_run, state
    if _start is not None:
        _start.close()


@flow(
    name=FLOW,
    persist_result=False,
    validate_parameters=False,
    on_completion=[_recorded],
    on_failure=[_recorded],
    on_cancellation=[_recorded],
    on_crashed=[_recorded],
)
def pipeline(
    run_file: str,
    overrides: list[str] | None = None,
    max_steps: int | None = None,
    home: str = ".mopd",
    plain: bool = False,
    seeds: str = "",
    merge_max_steps: int | None = None,
    expert_max_steps: dict[str, int] | None = None,
    ignore_memory: bool = False,
) -> Outcome:
    """Make every node of a run that is not yet in the store, then compare and report.

    Args:
        run_file: Path of the run file.
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
        home: `$MOPD_HOME`.
        plain: Plain progress lines even on a terminal.
        seeds: Seeds that replace the run file's, such as `0, 1, 2`; empty keeps those.
        merge_max_steps: Steps of the merge that replace the run file's.
        expert_max_steps: Expert -> steps that replace the run file's.
        ignore_memory: Start stages that are estimated not to fit.

    Returns:
        The comparison.

    Raises:
        CancelledRun: the run was stopped from outside.
        UserError: a mistake in the run file, or too little data. In a run that a worker started, this error and the
            next are not raised but returned as the state, which Prefect's page shows without a traceback.
        PipelineFailedError: one or more nodes failed.
    """
    global _ending, _start  # noqa: PLW0603 - the only way to the outcome for a caller if Prefect cannot record the end
    _ending, _start = None, None
    try:
        wanted = as_lines(overrides)
        if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 1):
            raise UserError(f"{CAP}: a whole number of at least 1 (given: {max_steps!r:.60})")
        config = load_run_file(Path(run_file), wanted, max_steps)
        if entries := form_overrides(config, seeds, merge_max_steps, expert_max_steps):
            wanted = [*wanted, *entries]
            config = load_run_file(Path(run_file), wanted, max_steps)
        _ending = _run(config, Path(run_file), Path(home), wanted, max_steps, plain, ignore_memory)
        return _ending
    except (UserError, PipelineFailedError) as error:
        _ending = error
        if RUN_VARIABLE not in os.environ:
            raise
        message = without_secrets(str(error))
        get_run_logger().error("%s", message)
        return cast(Outcome, Failed(message=message))


def ending() -> "Outcome | State[Any] | Exception | None":
    """The end of this process's last run, even if Prefect did not record it: a state if it was stopped from outside;
    None if the run did not reach its end."""
    return _ending


def _run(
    config: RunConfig,
    path: Path,
    root: Path,
    overrides: list[str],
    max_steps: int | None,
    plain: bool,
    ignore_memory: bool,
) -> Outcome:
    global _start  # noqa: PLW0603 - it is closed when Prefect has recorded the end
    claim_flow_run(config.name)
    outlive_worker(root / "runs" / config.name / OUTPUT_FILE)
    with interruptible(), notify_on_failure(config), one_at_a_time(Store(root), config.name):
        killed = killed_starts(root, config.name)
        mark_crashed_runs(config.name)
        _start = begin(root, config.name)
        title = name_flow_run(
            run_title(_start.number, config, planned_experts(root, config.name), overrides), config.name
        )
        send_notifications(Store(root), config)
        # Planned after the wait for another run of this name, which may have changed the champion to start from.
        graph = build_graph(config, root)
        store = Store(root)
        with Launcher(root, graph.config.resources) as launcher:
            if not all((store.root / node.key).exists() for node in graph.nodes):
                launcher.warm_up()
            for fault in store.send_left_over():
                get_run_logger().warning("%s; new artifacts stay on this machine until an upload succeeds", fault)
            for line in deep_check(graph, store, ignore_memory=ignore_memory):
                get_run_logger().warning("%s", line)
            # Written after the plan has been compared with the old lock: the new one is the reference of the next run.
            with plan_lock(store):
                write_lock(graph, root)
                remember(root, config.name, path, overrides, max_steps)
            tracker = Tracker.start(graph, root, path, flow_run_page(), title)
            for start in killed:
                start.close()
            get_run_logger().info("MLflow: %s", tracker.url or "not reached yet")
            with ProgressDisplay(Console(stderr=True), plain) as display:
                return _supervised(Supervisor(graph, store, launcher, tracker, display))


def _supervised(supervisor: Supervisor) -> Outcome:
    graph, tracker = supervisor.graph, supervisor.tracker
    resources = graph.config.resources
    jobs = jobs_of(graph)
    futures: dict[str, Future] = {}

    def submit(job: TaskGroup) -> Future:
        parents = [futures[parent] for parent in job.parents]
        # Without tags, because for each tag of a task Prefect requests a slot from its server, which may be down.
        with TagsContext(current_tags=set()):
            futures[job.id] = task_of(supervisor, job, resources.retries).submit(return_state=False, wait_for=parents)
        return futures[job.id]

    try:
        failures, not_started = schedule_jobs(jobs, resources.parallel_experts, submit)
    except KeyboardInterrupt:
        supervisor.stopping = True
        supervisor.launcher.stop_all()
        for future in futures.values():
            future.wait()
        tracker.finish("KILLED", None, None)
        notify(graph.config.notify, "cancellation", graph.config.name, f"{graph.config.name} was stopped", {})
        # Prefect sets a returned state as the flow's own and raises CancelledRun for the caller.
        return cast(Outcome, Cancelled(message="stopped from outside; what is finished is in the store"))
    finally:
        supervisor.launcher.stop_all()
    if failures:
        tracker.finish("FAILED", None, None)
        raise PipelineFailedError(failures, not_started)
    queue_notifications(supervisor.store, graph.config, {"flow_run": flow_run_page(), "mlflow": tracker.url})
    outcome = finish_run(graph, supervisor.store, promote=True)
    tracker.finish("FINISHED", outcome.results, outcome.report, outcome.candidate, outcome.verdict)
    _publish(supervisor, outcome)
    _notify_end(supervisor, outcome)
    return outcome


@contextlib.contextmanager
def notify_on_failure(config: RunConfig) -> Iterator[None]:
    """Send an exception of the block to the run file's webhook, and raise it again."""
    try:
        yield
    except Exception as error:
        message = without_secrets(str(error))
        first = message.splitlines()[0] if message else type(error).__name__
        facts = {"error": message, "flow_run": flow_run_page()}
        notify(config.notify, "failure", config.name, f"{config.name} failed: {first}", facts)
        raise


def _notify_end(supervisor: Supervisor, outcome: Outcome) -> None:
    """Notify the run file's webhook that the run is finished, and of promotions."""
    config, text = supervisor.graph.config, "\n".join(outcome.verdict_lines())
    facts = {
        "flow_run": flow_run_page(),
        "mlflow": supervisor.tracker.url,
        "report": str(outcome.report),
        "scores": outcome.rows(),
    }
    notify(config.notify, "success", config.name, f"{config.name} is finished\n{text}", facts)
    send_notifications(supervisor.store, config, facts)


@contextlib.contextmanager
def one_at_a_time(store: Store, name: str) -> Iterator[None]:
    """Exclude other runs of the same name. The next one waits, and then finds the artifacts of this one."""
    lock = store.lock(f"run-{name}")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        get_run_logger().warning("another run of %s is under way; this one waits for it", name)
        sys.stderr.write(f"another run of {name} is under way; this one waits for it (Ctrl-C to give up)\n")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def flow_run_page() -> str:
    """URL of this flow run in Prefect's pages; empty if there is none."""
    base = without_secrets(str(PREFECT_UI_URL.value() or PREFECT_API_URL.value() or "").removesuffix("/api"))
    return prefect_run_page(base, str(flow_run.id)) if base and flow_run.id else ""


def _publish(supervisor: Supervisor, outcome: Outcome) -> None:
    """Publish scores, report and links to MLflow on the flow run's page; a failure is a warning, as the run is done."""
    name, rows, tracked = supervisor.graph.config.name, outcome.rows(), supervisor.tracker.url
    try:
        if tracked:
            page = tracked.split(maxsplit=1)[0]
            create_link_artifact(page, "this run in MLflow", key=artifact_key(f"mlflow-{name}"))
            saved = saved_pages(supervisor.store.home, name)
            for kind in saved.keys() & {"champion", "lineage"}:
                address = page.partition("/#/")[0] + saved[kind]
                create_link_artifact(address, f"the {kind} in MLflow", key=artifact_key(f"{kind}-{name}"))
        create_table_artifact(rows, key=artifact_key(f"scores-{name}"), description=f"Scores of {name}")
        report = outcome.markdown()
        create_markdown_artifact(report, key=artifact_key(f"report-{name}"), description=f"Report of {name}")
    except (httpx.HTTPError, PrefectException) as error:
        cause = without_secrets(str(error))
        sys.stderr.write(f"warning: scores and report of {name} are not on Prefect's page: {cause}\n")
