"""The launcher with a node that has servers of its own: started with it, restarted, gone with it however it ends."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import flows.engines.launch
from base.store.checkpoint import Store
from flows.engines.launch import Launcher
from flows.engines.vllm_commands import Needs, ServerCommand
from flows.engines.vllm_servers import MOST_RESTARTS
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from tests.integration.engines.test_launch import RUN, Run, unmade
from tests.support import health_server
from tests.support.processes import below, ended, eventually

PROGRAM = (sys.executable, health_server.__file__)
NEEDS = Needs({"teachers": ["http://given:1"]}, (ServerCommand("rollout", "a test", PROGRAM),))


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


@pytest.fixture
def needed(monkeypatch: pytest.MonkeyPatch) -> Needs:
    """A node that asks for a small program in vLLM's place."""
    monkeypatch.setattr(flows.engines.launch, "node_needs", lambda *asked: NEEDS)
    return NEEDS


def spec(home: Path, key: str) -> dict:
    """The spec of the one attempt at a node."""
    (path,) = (home / "work" / key).glob("spec-*.json")
    return json.loads(path.read_text())


def server_below(supervisor: int) -> list[int]:
    """The processes of a server below a supervisor, once it and what it started are there."""
    leaders = below(psutil.Process(supervisor), str(health_server.__file__))
    return [leaders[0].pid, *(child.pid for child in leaders[0].children())] if leaders else []


def both(supervisor: int) -> list[int]:
    return eventually(lambda: (found := server_below(supervisor)) and len(found) == 2 and found)


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def said(run: Run, words: str) -> list[str]:
    """The notes with these words."""
    return [record["text"] for record in run.records if record["kind"] == "note" and words in record["text"]]


@pytest.mark.usefixtures("needed")
def test_a_nodes_servers_are_restarted_while_it_runs_and_end_with_it(launcher, graph, home):
    with Store(home).lock("served"):
        run = Run(launcher, graph, unmade(graph.node("base@0"), "served"))
        members = both(os.getpid())
        eventually(lambda: said(run, "answers"))
        (url,) = spec(home, "served")["servers"]["rollout"]
        eventually(lambda: answers(url))
        assert spec(home, "served")["servers"] == {"teachers": ["http://given:1"], "rollout": [url]}
        assert url in said(run, "is started; log")[0]
        os.kill(members[0], signal.SIGKILL)
        eventually(lambda: said(run, "was killed by signal 9; it is restarted"))
        eventually(lambda: len(said(run, "answers")) == 2)
        again = both(os.getpid())
        assert not set(again) & set(members)
        eventually(lambda: answers(url))
    run.join(240)
    assert run.error is None
    assert all(ended(pid) for pid in again)
    assert Store(home).find("served") is not None


@pytest.mark.usefixtures("needed")
def test_servers_that_cannot_be_kept_up_fail_the_node_for_another_attempt(launcher, graph, home):
    with Store(home).lock("unserved"):
        run = Run(launcher, graph, unmade(graph.node("base@0"), "unserved"))
        for start in range(1 + MOST_RESTARTS):
            eventually(lambda before=start: len(said(run, "answers")) > before)
            os.kill(both(os.getpid())[0], signal.SIGKILL)
        run.join(240)
    assert run.error is not None
    assert f"after {MOST_RESTARTS} restarts" in run.error.message
    assert (run.error.retryable, run.error.exit_code) == (True, -signal.SIGTERM)
    assert run.error.log.parent == home / "servers"
    assert server_below(os.getpid()) == []


@pytest.mark.usefixtures("needed")
def test_stop_all_ends_the_servers_too(graph, home):
    with Launcher(home, ResourcesConfig()) as launcher, Store(home).lock("stopped"):
        run = Run(launcher, graph, unmade(graph.node("base@0"), "stopped"))
        members = both(os.getpid())
        eventually(lambda: run.records)
        launcher.stop_all()
        assert ended(members[0])
        run.join(240)
        assert run.error is not None
        assert run.error.message == "stopped"
    assert all(ended(pid) for pid in members)


SUPERVISOR = """
import sys
from pathlib import Path
import flows.engines.launch
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from flows.plan.graph import build_graph
from tests.integration.engines.test_launch import RUN, silent, unmade
from tests.integration.engines.test_launch_servers import NEEDS

flows.engines.launch.node_needs = lambda *asked: NEEDS
home = Path(sys.argv[1])
graph = build_graph(RunConfig.model_validate(RUN), home)
with flows.engines.launch.Launcher(home, ResourcesConfig()) as launcher:
    launcher.run(graph, [unmade(graph.node("base@0"), "orphan")], silent)
"""


def test_servers_die_with_a_killed_supervisor(home):
    root = str(Path(__file__).parents[3])
    with Store(home).lock("orphan"):
        supervisor = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, str(home)], env=os.environ | {"PYTHONPATH": root}, cwd=root
        )
        members = both(supervisor.pid)
        supervisor.kill()
        supervisor.wait()
        assert eventually(lambda: all(ended(pid) for pid in members))
