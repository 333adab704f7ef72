"""The pipeline as a Prefect flow: walks the graph of a run, keeps what is finished, compares and reports.

Import this module only after `flows.run.session.open_session` has set Prefect's environment, for Prefect reads it once.
"""

import contextlib
import os
import queue
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import httpx
from filelock import Timeout
from prefect import flow, get_run_logger
from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.context import TagsContext
from prefect.exceptions import PrefectException
from prefect.futures import PrefectFuture
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
from flows.plan.graph import StageGraph, build_graph
from flows.plan.lock import write_lock
from flows.plan.shifts import COSINES, SHIFT
from flows.run.closing import Outcome, conclude
from flows.run.last_run import remember
from flows.run.orphans import FLOW, RUN_VARIABLE, claim_flow_run, mark_crashed_runs, name_flow_run, outlive_worker
from flows.run.progress import ProgressDisplay
from flows.run.starts import Start, begin, killed_starts, planned_experts, run_title
from flows.run.tasks import Job, Supervisor, artifact_key, task_of
from flows.run_file.load import load_run_file
from flows.run_file.parameters import CAP, as_lines, form_overrides
from flows.run_file.schema import RunConfig
from flows.servers.pages import known_pages
from flows.servers.start import prefect_run_page, without_secrets
from flows.tracking.gc import plan_lock
from flows.tracking.tracker import Tracker

OUTPUT_FILE = "output.log"
Future = PrefectFuture[Any]
_ending: Outcome | State[Any] | Exception | None = None
_start: Start | None = None


class PipelineFailedError(Exception):
    """Some nodes failed; all others that could be made are in the store.

    Attributes:
        failures: Job id -> what ended it.
        not_started: Ids of the jobs that needed one of them.
    """

    def __init__(self, failures: Mapping[str, Exception], not_started: Sequence[str]) -> None:
        lines = [str(error) for error in failures.values()]
        if not_started:
            lines.append(f"not started: {', '.join(not_started)}")
        super().__init__("\n".join(lines))
        self.failures = failures
        self.not_started = not_started


def _recorded(flow: Any, flow_run: Any, state: State[Any]) -> None:
    """The end of the flow run is recorded, so no later start has to do it."""
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
) -> Outcome:
    """Make every node of a run that is not in the store yet, then compare and report.

    Args:
        run_file: Path of the run file.
        overrides: Dotted assignments to its keys.
        max_steps: Cap on the steps of every stage.
        home: `$MOPD_HOME`.
        plain: Plain progress lines even on a terminal.
        seeds: Seeds in place of the run file's, such as `0, 1, 2`; empty for those.
        merge_max_steps: Steps of the merge in place of the run file's.
        expert_max_steps: Expert -> steps in place of the run file's.

    Returns:
        The comparison.

    Raises:
        CancelledRun: the run was stopped from outside.
        UserError: a mistake in the run file, or data that does not suffice. Of a run that a worker began this is, as
            the next, no exception but its state, which Prefect's page shows without a traceback.
        PipelineFailedError: one or more nodes failed.
    """
    global _ending, _start  # noqa: PLW0603 - a flow's caller gets nothing else when Prefect cannot record its end
    _ending, _start = None, None
    try:
        wanted = as_lines(overrides)
        if max_steps is not None and (not isinstance(max_steps, int) or max_steps < 1):
            raise UserError(f"{CAP}: a whole number from 1 on (given: {max_steps!r:.60})")
        config = load_run_file(Path(run_file), wanted, max_steps)
        if entries := form_overrides(config, seeds, merge_max_steps, expert_max_steps):
            wanted = [*wanted, *entries]
            config = load_run_file(Path(run_file), wanted, max_steps)
        _ending = _run(config, Path(run_file), Path(home), wanted, max_steps, plain)
        return _ending
    except (UserError, PipelineFailedError) as error:
        _ending = error
        if RUN_VARIABLE not in os.environ:
            raise
        said = without_secrets(str(error))
        get_run_logger().error("%s", said)
        return cast(Outcome, Failed(message=said))


def ending() -> "Outcome | State[Any] | Exception | None":
    """How the last run of this process ended, whether or not Prefect could record it; None if it did not come to that.

    A state is that of a run which was stopped from outside.
    """
    return _ending


def _run(
    config: RunConfig, path: Path, root: Path, overrides: list[str], max_steps: int | None, plain: bool
) -> Outcome:
    global _start  # noqa: PLW0603 - it is closed when Prefect has recorded the end
    claim_flow_run(config.name)
    outlive_worker(root / "runs" / config.name / OUTPUT_FILE)
    with interruptible(), told(config), one_at_a_time(Store(root), config.name):
        killed = killed_starts(root, config.name)
        mark_crashed_runs(config.name)
        _start = begin(root, config.name)
        title = name_flow_run(
            run_title(_start.number, config, planned_experts(root, config.name), overrides), config.name
        )
        send_notifications(Store(root), config)
        # Planned only now: a run of this name that was waited for may have moved what it starts from.
        graph = build_graph(config, root)
        store = Store(root)
        for fault in store.send_left_over():
            get_run_logger().warning("%s; what is made here stays here until it is sent", fault)
        deep_check(graph, store)
        # Compared with what this name made last time only once: the new lock is the next run's past.
        with plan_lock(store):
            write_lock(graph, root)
            remember(root, config.name, path, overrides, max_steps)
        tracker = Tracker.start(graph, root, path, flow_run_page(), title)
        for start in killed:
            start.close()
        get_run_logger().info("MLflow: %s", tracker.url or "not reached yet")
        with (
            ProgressDisplay(Console(stderr=True), plain) as display,
            Launcher(root, graph.config.resources) as launcher,
        ):
            supervisor = Supervisor(graph, store, launcher, tracker, display)
            return _supervised(supervisor)


def _supervised(supervisor: Supervisor) -> Outcome:
    graph, tracker = supervisor.graph, supervisor.tracker
    resources = graph.config.resources
    jobs = jobs_of(graph)
    futures: dict[str, Future] = {}

    def submit(job: Job) -> Future:
        parents = [futures[parent] for parent in job.parents]
        # Prefect asks its server for a slot of every tag of a task, and a run goes on without its server.
        with TagsContext(current_tags=set()):
            futures[job.id] = task_of(supervisor, job, resources.retries).submit(return_state=False, wait_for=parents)
        return futures[job.id]

    try:
        failures, not_started = walk(jobs, resources.parallel_experts, submit)
    except KeyboardInterrupt:
        supervisor.stopping = True
        supervisor.launcher.stop_all()
        for future in futures.values():
            future.wait()
        tracker.finish("KILLED", None, None)
        notify(graph.config.notify, "cancellation", graph.config.name, f"{graph.config.name} was stopped", {})
        # Prefect takes a returned state as the flow's own; its caller gets CancelledRun.
        return cast(Outcome, Cancelled(message="stopped from outside; what is finished is in the store"))
    finally:
        supervisor.launcher.stop_all()
    if failures:
        tracker.finish("FAILED", None, None)
        raise PipelineFailedError(failures, not_started)
    queue_notifications(supervisor.store, graph.config, {"flow_run": flow_run_page(), "mlflow": tracker.url})
    outcome = conclude(graph, supervisor.store, promote=True)
    tracker.finish("FINISHED", outcome.results, outcome.report, outcome.candidate, outcome.verdict)
    _publish(supervisor, outcome)
    _tell_end(supervisor, outcome)
    return outcome


def jobs_of(graph: StageGraph) -> list[Job]:
    """The graph's nodes as jobs: a training node each, and the evaluations of a checkpoint together by their kind."""
    jobs = []
    for node in graph.checkpoints:
        jobs.append(Job(node.id, (node,), tuple(dict.fromkeys(node.parents.values()))))
        for stage, prefix in (("evaluate", "eval"), ("harness", "harness")):
            if evaluations := tuple(own for own in graph.evaluations(node.id) if own.stage == stage):
                jobs.append(Job(f"{prefix}/{node.id}", evaluations, (node.id,)))
    others = [node for node in graph.nodes if node.stage in (SHIFT, COSINES)]
    return jobs + [Job(node.id, (node,), tuple(dict.fromkeys(node.parents.values()))) for node in others]


def walk(jobs: Sequence[Job], slots: int, submit: Callable[[Job], Future]) -> tuple[dict[str, Exception], list[str]]:
    """Submit every job once its parents are done, the longest way to the end first; evaluations fill idle slots.

    A failed job keeps only those from starting that depend on it.

    Args:
        jobs: All jobs, parents before children.
        slots: Jobs at one time.
        submit: Starts a job.

    Returns:
        What ended each job that failed, and ids of the jobs that were not started because they depend on one.
    """
    ahead = _ways_to_the_end(jobs)
    order = sorted(jobs, key=lambda job: (not job.training, -ahead[job.id]))
    waiting = {job.id: job for job in order}
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    active: dict[str, Future] = {}
    done: set[str] = set()
    failed: dict[str, Exception] = {}
    while True:
        ready = [job for job in waiting.values() if done.issuperset(job.parents)]
        for job in ready[: slots - len(active)]:
            del waiting[job.id]
            active[job.id] = submit(job)
            active[job.id].add_done_callback(_reporter(ended, job.id))
        if not active:
            return failed, list(waiting)
        job_id = ended.get()
        future = active.pop(job_id)
        # Until it has been waited for, a finished future may still show the state of before.
        future.wait()
        if future.state.is_completed():
            done.add(job_id)
        else:
            failed[job_id] = _failure(future.state)


def _reporter(ended: "queue.SimpleQueue[str]", job_id: str) -> Callable[[Future], None]:
    def report(future: Future) -> None:
        del future
        ended.put(job_id)

    return report


def _failure(state: State[Any]) -> Exception:
    error = state.result(raise_on_failure=False)
    return error if isinstance(error, Exception) else RuntimeError(f"{state.name}: {state.message}")


def _ways_to_the_end(jobs: Sequence[Job]) -> dict[str, int]:
    """Steps of the longest chain of training jobs from each job on, itself included."""
    ahead: dict[str, int] = {}
    for job in reversed(jobs):
        own = int(job.nodes[0].config.get("max_steps", 1)) if job.training else 0
        ahead[job.id] = own + max((ahead[other.id] for other in jobs if job.id in other.parents), default=0)
    return ahead


@contextlib.contextmanager
def told(config: RunConfig) -> Iterator[None]:
    """Tell the webhook of the run file how a run ended badly."""
    try:
        yield
    except Exception as error:
        said = without_secrets(str(error))
        first = said.splitlines()[0] if said else type(error).__name__
        facts = {"error": said, "flow_run": flow_run_page()}
        notify(config.notify, "failure", config.name, f"{config.name} failed: {first}", facts)
        raise


def _tell_end(supervisor: Supervisor, outcome: Outcome) -> None:
    """Tell the webhook of the run file that a run is finished, and of a promotion."""
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
    """Let one run of a name work at a time; the next waits until that is done, and finds what it made."""
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
    """Address of this flow run in Prefect's pages."""
    base = without_secrets(str(PREFECT_UI_URL.value() or PREFECT_API_URL.value() or "").removesuffix("/api"))
    return prefect_run_page(base, str(flow_run.id)) if base and flow_run.id else ""


def _publish(supervisor: Supervisor, outcome: Outcome) -> None:
    """Put the scores, the report's place and the ways to MLflow onto the flow run's page; a server that is away costs
    the page, not the run, for that is finished and its champion chosen."""
    name, rows, tracked = supervisor.graph.config.name, outcome.rows(), supervisor.tracker.url
    try:
        if tracked:
            page = tracked.split(maxsplit=1)[0]
            create_link_artifact(page, "this run in MLflow", key=artifact_key(f"mlflow-{name}"))
            known = known_pages(supervisor.store.home, name)
            for kind in known.keys() & {"champion", "lineage"}:
                address = page.partition("/#/")[0] + known[kind]
                create_link_artifact(address, f"the {kind} in MLflow", key=artifact_key(f"{kind}-{name}"))
        create_table_artifact(rows, key=artifact_key(f"scores-{name}"), description=f"Scores of {name}")
        report = outcome.markdown()
        create_markdown_artifact(report, key=artifact_key(f"report-{name}"), description=f"Report of {name}")
    except (httpx.HTTPError, PrefectException) as error:
        said = without_secrets(str(error))
        sys.stderr.write(f"warning: scores and report of {name} are not on Prefect's page: {said}\n")
