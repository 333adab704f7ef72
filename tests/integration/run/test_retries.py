"""Which failures of a node are tried again: from its process's exit code to Prefect's task, with real ones of both."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.engines import launch
from flows.engines.launch import Launcher, NodeFailedError
from flows.engines.worker import DISK_FAULT, FAILED, INFRASTRUCTURE_FAULT, OUT_OF_MEMORY, USER_ERROR
from flows.plan.graph import build_graph
from flows.plan.nodes import Node
from flows.run import tasks
from flows.run.schedule import jobs_of
from flows.run.tasks import TaskGroup, task_of
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from tests.integration.engines.test_launch import RUN
from tests.support.processes import prefect_of

RETRIES = 2


class Making:
    """A supervisor that tells nobody."""

    def __init__(self, home: Path, launcher: Launcher) -> None:
        self.graph, self.launcher = build_graph(RunConfig.model_validate(RUN), home), launcher

    def make(self, job: TaskGroup) -> None:
        def silent(node: Node, records: list[dict[str, Any]]) -> None:
            pass

        self.launcher.run(self.graph, job.nodes, silent)


@pytest.fixture(scope="module")
def making(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Making]:
    home = tmp_path_factory.mktemp("home")
    with prefect_of(home, 23900), Launcher(home, ResourcesConfig()) as launcher:
        yield Making(home, launcher)


@pytest.mark.parametrize(
    ("code", "attempts"),
    [(INFRASTRUCTURE_FAULT, 1 + RETRIES), (USER_ERROR, 1), (FAILED, 1), (DISK_FAULT, 1), (OUT_OF_MEMORY, 2)],
)
def test_only_a_fault_of_the_infrastructure_is_tried_again(making, tmp_path, monkeypatch, code, attempts):
    count = tmp_path / "attempts"
    program = f"open({str(count)!r}, 'a').write('x'); raise SystemExit({code})"
    monkeypatch.setattr(launch, "_program", lambda spec, devices: {"command": [sys.executable, "-c", program]})
    monkeypatch.setattr(tasks, "RETRY_SECONDS", 0.0)
    job = jobs_of(making.graph)[0]
    state = task_of(making, job, RETRIES)(return_state=True)
    error = state.result(raise_on_failure=False)
    assert isinstance(error, NodeFailedError) and error.exit_code == code
    assert len(count.read_text()) == attempts


def test_a_fault_that_passes_is_forgotten(making, tmp_path, monkeypatch):
    mark = tmp_path / "mark"
    program = (
        f"import pathlib, runpy, sys\nmark = pathlib.Path({str(mark)!r})\n"
        "if not mark.exists():\n    mark.touch()\n    raise SystemExit(75)\n"
        "sys.argv[0] = 'worker'\nrunpy.run_module('flows.engines.worker', run_name='__main__')"
    )
    monkeypatch.setattr(
        launch, "_program", lambda spec, devices: {"command": [sys.executable, "-c", program, str(spec)]}
    )
    monkeypatch.setattr(tasks, "RETRY_SECONDS", 0.0)
    job = jobs_of(making.graph)[0]
    assert task_of(making, job, RETRIES)(return_state=True).is_completed()
    assert mark.exists() and making.launcher.store.find(job.nodes[0].key) is not None
