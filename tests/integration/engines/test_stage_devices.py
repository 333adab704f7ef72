"""A stage's process sees the devices of its lease and no others: fake ones, and a real tiny stage."""

import os
from pathlib import Path

import pytest

from base.store.checkpoint import Store
from flows.engines.launch import Launcher
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from tests.integration.engines.test_launch import RUN, Run, unmade
from tests.support.devices import claimed_devices
from tests.support.processes import eventually, jobs_of

# Stands for NVIDIA's library: writes down which devices are asked for, and counts a joule with each question.
LIBRARY = """
import itertools, pathlib
class NVMLError(Exception): pass
_counter = itertools.count()
_asked = pathlib.Path(__file__).with_name("asked")
def nvmlInit(): pass
def nvmlDeviceGetHandleByIndex(index):
    with _asked.open("a") as file:
        file.write(f"{index}\\n")
nvmlDeviceGetHandleByUUID = nvmlDeviceGetHandleByIndex
def nvmlDeviceGetTotalEnergyConsumption(handle): return 1000 * next(_counter)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "library"
    folder.mkdir()
    (folder / "pynvml.py").write_text(LIBRARY)
    monkeypatch.setenv("PYTHONPATH", claimed_devices(folder))
    monkeypatch.setenv("MOPD_DEVICE_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-six,9")
    return folder


@pytest.fixture
def graph(tmp_path: Path) -> StageGraph:
    return build_graph(RunConfig.model_validate(RUN), tmp_path / "home")


def test_stages_side_by_side_have_a_device_each(library: Path, graph: StageGraph, tmp_path: Path) -> None:
    home, keys = tmp_path / "home", ("left", "right")
    with Launcher(home, ResourcesConfig(gpus=1)) as launcher:
        with Store(home).lock(keys[0]), Store(home).lock(keys[1]):
            runs = [Run(launcher, graph, unmade(graph.node("base@0"), key)) for key in keys]
            # Both wait for their node, and hold their device meanwhile.
            eventually(lambda: all(run.records for run in runs))
        for run in runs:
            run.join()
            assert run.error is None
    # Forked, not executed: what it asks the library shows its variables, where `/proc` shows its fork server's.
    assert set((library / "asked").read_text().split()) == {"4", "GPU-six"}
    for key in keys:
        assert Store(home).get(key).manifest["joules"] > 0


def test_the_ranks_of_a_stage_have_all_of_its_lease(library: Path, graph: StageGraph, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with Launcher(home, ResourcesConfig(gpus=2)) as launcher, Store(home).lock("two ranks"):
        run = Run(launcher, graph, unmade(graph.node("base@0"), "two ranks"))
        eventually(lambda: run.records)
        (agent,) = jobs_of(os.getpid())
        ranks = agent.children()
        assert len(ranks) == 2
        for process in (agent, *ranks):
            assert process.environ()["CUDA_VISIBLE_DEVICES"] == "4,GPU-six"
        launcher.stop_all()
        run.join()
