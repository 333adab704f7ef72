"""The order in which a run's jobs start: those with the longest chain of training steps come first."""

import queue
from collections.abc import Callable, Sequence
from typing import Any

from prefect.futures import PrefectFuture
from prefect.states import State

from flows.plan.nodes import StageGraph
from flows.run.tasks import TaskGroup
from stages.config.kinds import DISTANCES

Future = PrefectFuture[Any]


def jobs_of(graph: StageGraph) -> list[TaskGroup]:
    """The jobs of a graph: one for each training node, and one for each kind of evaluation of each checkpoint."""
    jobs = []
    for node in graph.checkpoints:
        jobs.append(TaskGroup(node.id, (node,), tuple(dict.fromkeys(node.parents.values()))))
        for stage, prefix in (("evaluate", "eval"), ("harness", "harness")):
            if evaluations := tuple(own for own in graph.evaluations(node.id) if own.stage == stage):
                jobs.append(TaskGroup(f"{prefix}/{node.id}", evaluations, (node.id,)))
    others = [node for node in graph.nodes if node.stage in DISTANCES]
    return jobs + [TaskGroup(node.id, (node,), tuple(dict.fromkeys(node.parents.values()))) for node in others]


def schedule_jobs(
    jobs: Sequence[TaskGroup], slots: int, submit: Callable[[TaskGroup], Future]
) -> tuple[dict[str, Exception], list[str]]:
    """Submit every job when its parents are done, in the order of the longest remaining chain of training steps.

    Evaluations fill idle slots. A failed job prevents only the jobs that depend on it.

    Args:
        jobs: All jobs, parents before children.
        slots: Maximum number of concurrent jobs.
        submit: Starts a job.

    Returns:
        The error of each failed job by id, and the ids of the jobs that were not started because they depend on one.
    """
    remaining = _remaining_steps(jobs)
    order = sorted(jobs, key=lambda job: (not job.training, -remaining[job.id]))
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
        # Until `wait` returns, a finished future may still have its previous state.
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


def _remaining_steps(jobs: Sequence[TaskGroup]) -> dict[str, int]:
    """Job id -> steps of the longest chain of training jobs that starts with this job, itself included."""
    remaining: dict[str, int] = {}
    for job in reversed(jobs):
        own = int(job.nodes[0].config.get("max_steps", 1)) if job.training else 0
        remaining[job.id] = own + max((remaining[other.id] for other in jobs if job.id in other.parents), default=0)
    return remaining
