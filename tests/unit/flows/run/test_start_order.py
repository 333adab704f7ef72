"""The order in which jobs start."""

from pathlib import Path

from prefect.states import Completed, Failed

from flows.plan.graph import build_graph
from flows.run.schedule import jobs_of, schedule_jobs
from tests.unit.flows.run_file.test_config import MINIMAL, load

RL = {"prompts_per_step": 16, "group_size": 8}


class Done:
    """A future that has ended."""

    def __init__(self, state) -> None:
        self.state = state

    def add_done_callback(self, call) -> None:
        call(self)

    def wait(self) -> None:
        pass


def started(tmp_path: Path, slots: int, failing: str = "", **changes) -> tuple[list[str], list[str], list[str]]:
    graph = build_graph(load(tmp_path, **changes), tmp_path / "home")
    order = []

    def submit(job):
        order.append(job.id)
        return Done(Failed(message="no") if job.id == failing else Completed())

    failures, not_started = schedule_jobs(jobs_of(graph), slots, submit)
    return order, list(failures), not_started


def test_the_expert_with_most_tokens_starts_first_though_it_has_fewest_steps(tmp_path: Path) -> None:
    experts = {
        "many": {"domain": "sort", "train": {"rl": {"max_steps": 200, "max_new_tokens": 14, **RL}}},
        "few": {"domain": "general", "train": {"sft": {"max_steps": 100, "batch_size": 8}}},
        "long": {"domain": "reverse", "train": {"rl": {"max_steps": 90, "max_new_tokens": 70, **RL}}},
    }
    merge = {**MINIMAL["merge"], "anchor": None}
    order, failures, not_started = started(tmp_path, 1, experts=experts, merge=merge)
    assert [job for job in order if job.startswith("experts/")] == [f"experts/{n}@0" for n in ("long", "many", "few")]
    assert (failures, not_started) == ([], [])


def test_parents_come_first_and_measurements_after_the_training_that_is_ready(tmp_path: Path) -> None:
    order = started(tmp_path, 1)[0]
    assert order[:2] == ["base@0", "cold_start@0"]
    assert order.index("student@0") < min(at for at, job in enumerate(order) if job.startswith("eval/"))
    assert {"experts/sort@0", "experts/reverse@0"} == set(order[2:4])


def test_what_needs_a_failed_job_is_not_started_and_all_else_is(tmp_path: Path) -> None:
    order, failures, not_started = started(tmp_path, 2, failing="experts/sort@0")
    assert failures == ["experts/sort@0"]
    assert "student@0" in not_started and "eval/experts/sort@0" in not_started
    assert "experts/reverse@0" in order and "eval/experts/reverse@0" in order
