"""Node processes: started, watched and ended, with a real tiny model."""

import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from base.store.checkpoint import Store
from flows.engines.devices import FOLDER_VARIABLE
from flows.engines.launch import Launcher, NodeFailedError
from flows.plan.graph import build_graph
from flows.plan.nodes import Node, StageGraph
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from tests.support.devices import claimed_devices
from tests.support.processes import ended, eventually, jobs_of

STEPS = 4
RUN = {
    "name": "launch",
    "seeds": [0, 1],
    "base": {
        "pretrain": {
            "max_steps": STEPS,
            "examples": 20,
            "batch_tokens": 256,
            "model": {"hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 16, "max_length": 64},
        }
    },
    "domains": {
        "sort": {"kind": "strings", "options": {"task": "sort"}},
        "reverse": {"kind": "strings", "options": {"task": "reverse"}},
    },
    "evaluate": {"examples": 4, "samples": 0, "max_new_tokens": 4},
}


def silent(node: Node, records: list[dict[str, Any]]) -> None:
    """For runs whose journal is not looked at."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def graph(home: Path) -> StageGraph:
    return build_graph(RunConfig.model_validate(RUN), home)


@pytest.fixture(scope="module")
def launcher(home: Path) -> Iterator[Launcher]:
    with Launcher(home, ResourcesConfig()) as running:
        yield running
    assert jobs_of(os.getpid()) == []


def unmade(node: Node, key: str) -> Node:
    """A copy of a node under a key nothing stands at."""
    return dataclasses.replace(node, key=key)


class Run(threading.Thread):
    """A `Launcher.run` in a thread of its own, as the pipeline's tasks call it."""

    def __init__(self, launcher: Launcher, graph: StageGraph, node: Node) -> None:
        super().__init__()
        self.launcher, self.graph, self.node = launcher, graph, node
        self.records: list[dict[str, Any]] = []
        self.error: NodeFailedError | None = None
        self.start()

    def run(self) -> None:
        try:
            self.launcher.run(self.graph, [self.node], lambda node, records: self.records.extend(records))
        except NodeFailedError as error:
            self.error = error


def test_a_checkpoint_and_its_evaluations_are_made_and_reported_in_order(launcher, graph, home):
    records: dict[str, list[dict[str, Any]]] = {}

    def keep(node: Node, new: list[dict[str, Any]]) -> None:
        records.setdefault(node.id, []).extend(new)

    base = graph.node("base@0")
    launcher.run(graph, [base], keep)
    assert [r["step"] for r in records["base@0"] if r["kind"] == "progress"] == list(range(1, STEPS + 1))
    artifact = Store(home).get(base.key)
    assert artifact.manifest["node"] == "base@0"
    assert artifact.manifest["ingredients"] == base.ingredients

    evaluations = graph.evaluations("base@0")
    assert len(evaluations) > 1
    launcher.run(graph, evaluations, keep)
    for node in evaluations:
        assert Store(home).get(node.key).manifest["parents"]["checkpoint"]["key"] == base.key
        assert records[node.id][-1]["kind"] in ("progress", "metrics", "sample")


def test_nodes_of_different_checkpoints_cannot_share_a_process(launcher, graph):
    with pytest.raises(ValueError, match="one process"):
        launcher.run(graph, [graph.node("base@0"), graph.node("base@1")], silent)


def test_a_users_mistake_comes_back_as_its_message(launcher, graph, tmp_path):
    source = {"kind": "directory", "location": str(tmp_path / "gone"), "revision": None}
    node = dataclasses.replace(unmade(graph.node("base@0"), "gone"), stage="load", config=source)
    with pytest.raises(NodeFailedError) as caught:
        launcher.run(graph, [node], silent)
    error = caught.value
    assert (error.exit_code, error.user_error, error.retryable) == (2, True, False)
    assert str(tmp_path / "gone") in error.message
    assert "Traceback" not in error.log.read_text()


def test_a_crash_names_the_log_with_its_traceback(launcher, graph):
    node = dataclasses.replace(unmade(graph.node("base@0"), "crash"), config={"max_stepz": 1})
    with pytest.raises(NodeFailedError) as caught:
        launcher.run(graph, [node], silent)
    error = caught.value
    assert (error.exit_code, error.user_error, error.retryable) == (1, False, False)
    assert str(error.log) in str(error)
    assert "Traceback" in error.log.read_text()
    assert "max_stepz" in error.message


def test_a_killed_process_is_worth_a_retry_and_others_are_not_touched(launcher, graph, home):
    victim = unmade(graph.node("base@0"), "victim")
    with Store(home).lock("victim"):
        run = Run(launcher, graph, victim)
        eventually(lambda: run.records)
        (process,) = jobs_of(os.getpid())
        assert os.getpgid(process.pid) == process.pid
        bystander = Run(launcher, graph, graph.node("base@1"))
        process.kill()
        run.join(240)
    bystander.join()
    assert run.error is not None
    assert (run.error.exit_code, run.error.retryable) == (-signal.SIGKILL, True)
    assert bystander.error is None
    assert Store(home).find(graph.node("base@1").key) is not None


def test_two_nodes_run_side_by_side(launcher, graph, home):
    with Store(home).lock("left"), Store(home).lock("right"):
        runs = [Run(launcher, graph, unmade(graph.node("base@0"), key)) for key in ("left", "right")]
        eventually(lambda: all(run.records for run in runs))
        assert len(jobs_of(os.getpid())) == 2
        assert [run.records[0]["text"] for run in runs] == ["waiting for another run that makes this node"] * 2
    for run in runs:
        run.join()
        assert run.error is None
    assert Store(home).get("left").digest == Store(home).get("right").digest


def test_a_failing_listener_ends_the_process(launcher, graph, home):
    def broken(node: Node, records: list[dict[str, Any]]) -> None:
        raise ConnectionError("tracking is gone")

    with Store(home).lock("unheard"):
        with pytest.raises(ConnectionError, match="tracking"):
            launcher.run(graph, [unmade(graph.node("base@0"), "unheard")], broken)
        eventually(lambda: jobs_of(os.getpid()) == [])


def test_stop_all_and_timeout(graph, home):
    with Launcher(home, ResourcesConfig(timeout_minutes=0.05)) as slow, Store(home).lock("slow"):
        with pytest.raises(
            NodeFailedError, match=r"reported nothing for longer than resources\.timeout_minutes"
        ) as caught:
            slow.run(graph, [unmade(graph.node("base@0"), "slow")], silent)
        # It may hang in a collective, and its saved steps are kept.
        assert caught.value.retryable is True
        assert caught.value.exit_code == -signal.SIGTERM

    with Launcher(home, ResourcesConfig()) as launcher, Store(home).lock("stop 1"), Store(home).lock("stop 2"):
        runs = [Run(launcher, graph, unmade(graph.node("base@0"), key)) for key in ("stop 1", "stop 2")]
        eventually(lambda: all(run.records for run in runs))
        started = time.monotonic()
        launcher.stop_all()
        launcher.stop_all()
        assert time.monotonic() - started < 120
        for run in runs:
            run.join(240)
            assert run.error is not None
            assert (run.error.message, run.error.retryable) == ("stopped", False)
        with pytest.raises(NodeFailedError, match="stopped"):
            launcher.run(graph, [unmade(graph.node("base@0"), "stop 3")], silent)


SUPERVISOR = """
import sys
from pathlib import Path
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from flows.engines.launch import Launcher
from flows.plan.graph import build_graph
from tests.integration.engines.test_launch import RUN, silent, unmade

home = Path(sys.argv[1])
graph = build_graph(RunConfig.model_validate(RUN), home)
with Launcher(home, ResourcesConfig()) as launcher:
    launcher.run(graph, [unmade(graph.node("base@0"), "orphan")], silent)
"""


def test_nodes_die_with_a_killed_supervisor(home):
    root = str(Path(__file__).parents[3])
    with Store(home).lock("orphan"):
        supervisor = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(home)], env=os.environ | {"PYTHONPATH": root}, cwd=root
        )
        (job,) = eventually(lambda: jobs_of(supervisor.pid))
        (server,) = psutil.Process(supervisor.pid).children()
        supervisor.kill()
        supervisor.wait()
        assert eventually(lambda: ended(job.pid) and ended(server.pid))


def test_the_server_that_forked_was_fit_to_fork(launcher, graph, home):
    with Store(home).lock("forked"):
        run = Run(launcher, graph, unmade(graph.node("base@0"), "forked"))
        eventually(lambda: run.records)
        (job,) = jobs_of(os.getpid())
        server = psutil.Process(job.ppid())
        assert any("torch" in mapped.path for mapped in server.memory_maps())
    run.join()
    threads = {(task / "comm").read_text().strip() for task in Path(f"/proc/{server.pid}/task").iterdir()}
    # The allocator that pyarrow brings keeps a thread which it stops and restarts around a fork itself.
    assert threads - {"jemalloc_bg_thd"} == {(Path(f"/proc/{server.pid}") / "comm").read_text().strip()}


def test_several_devices_run_under_torchrun(graph, home, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", claimed_devices(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv(FOLDER_VARIABLE, str(home / "device-locks"))
    node = unmade(graph.node("base@0"), "two ranks")
    with Launcher(home, ResourcesConfig(gpus=2)) as launcher:
        run = Run(launcher, graph, node)
        run.join()
        assert run.error is None
        assert [r["step"] for r in run.records if r["kind"] == "progress"] == list(range(1, STEPS + 1))
        # Found made: no rank may wait for one that has nothing to do.
        launcher.run(graph, [node], silent)

        broken = dataclasses.replace(unmade(node, "broken"), domains={"x": {"kind": "nope", "options": {}}})
        with pytest.raises(NodeFailedError, match="unknown kind 'nope'") as caught:
            launcher.run(graph, [broken], silent)
        assert caught.value.user_error

        with Store(home).lock("killed rank"):
            run = Run(launcher, graph, unmade(node, "killed rank"))
            eventually(lambda: run.records)
            (agent,) = jobs_of(os.getpid())
            ranks = agent.children()
            next(rank for rank in ranks if rank.environ()["RANK"] == "0").kill()
            run.join(240)
        assert run.error is not None
        assert (run.error.exit_code, run.error.retryable) == (-signal.SIGKILL, True)
        assert len(ranks) == 2
        eventually(lambda: all(ended(rank.pid) for rank in ranks))

        with Store(home).lock("stopped ranks"):
            run = Run(launcher, graph, unmade(node, "stopped ranks"))
            eventually(lambda: run.records)
            ranks = jobs_of(os.getpid())[0].children()
            launcher.stop_all()
            eventually(lambda: all(ended(rank.pid) for rank in ranks))
        run.join()
        assert run.error is not None
        assert run.error.message == "stopped"
