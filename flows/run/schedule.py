"""The order in which a run's jobs start: those with the longest chain of training come first, in tokens."""

import queue
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from prefect.futures import PrefectFuture
from prefect.states import State

from flows.plan.nodes import StageGraph
from flows.run.tasks import TaskGroup
from stages.config.kinds import DISTANCES

Future = PrefectFuture[Any]
# Tokens of a row of given data, whose length is not known before it is tokenised.
ASSUMED_ROW = 64


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
    """Submit every job when its parents are done, in the order of the longest remaining chain of training.

    A chain's length is the estimated number of tokens that its stages process.

    Evaluations fill idle slots. A failed job prevents only the jobs that depend on it.

    Args:
        jobs: All jobs, parents before children.
        slots: Maximum number of concurrent jobs.
        submit: Starts a job.

    Returns:
        The error of each failed job by id, and the ids of the jobs that were not started because they depend on one.
    """
    remaining = _remaining_tokens(jobs)
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


def _remaining_tokens(jobs: Sequence[TaskGroup]) -> dict[str, float]:
    """Job id -> tokens of the longest chain of training jobs that starts with this job, itself included."""
    remaining: dict[str, float] = {}
    for job in reversed(jobs):
        own = _tokens(job.nodes[0].config) if job.training else 0.0
        remaining[job.id] = own + max((remaining[other.id] for other in jobs if job.id in other.parents), default=0.0)
    return remaining


def _tokens(config: Mapping[str, Any]) -> float:
    """An estimate of the tokens that a training stage processes, from its settings alone."""
    if "batch_tokens" in config:
        per_step = config["batch_tokens"]
    elif "batch_size" in config:
        per_step = config["batch_size"] * ASSUMED_ROW
    else:
        rows = config.get("prompts_per_step", 1) * config.get("group_size", 1)
        per_step = rows * config.get("max_new_tokens", ASSUMED_ROW)
    return float(config.get("max_steps", 1) * per_step)
