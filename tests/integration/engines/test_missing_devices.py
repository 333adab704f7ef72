"""A run that asks for devices which torch cannot use: exit code 2 and one message, before or in the first stage."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from base.store.checkpoint import Store
from flows.engines.devices import FOLDER_VARIABLE
from flows.engines.launch import Launcher, NodeFailedError
from flows.engines.process_spec import ProcessSpec
from flows.engines.worker import ERROR_FILE, USER_ERROR
from flows.plan.graph import build_graph
from flows.plan.nodes import StageGraph
from flows.run_file.resources import ResourcesConfig
from flows.run_file.schema import RunConfig
from tests.integration.engines.test_launch import RUN, silent, unmade
from tests.integration.run.test_pipeline import PATIENCE_SECONDS
from tests.support.devices import DRIVER, stand_in_driver
from tests.support.homes import clean_environment

ROOT = Path(__file__).parents[3]
SMOKE = ROOT / "flows" / "runs" / "smoke.yaml"
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="torch can use this machine's devices")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A driver that lists two devices, and a torch without CUDA."""
    own = clean_environment("CUDA_")
    path = stand_in_driver(tmp_path / "driver")
    return own | {"PATH": path, FOLDER_VARIABLE: str(tmp_path / "locks"), "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def leased(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for what this process launches."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture
def graph(tmp_path: Path) -> StageGraph:
    return build_graph(RunConfig.model_validate(RUN), tmp_path / "home")


def left_in(home: Path) -> list[str]:
    """Checkpoints in the store, saved steps and champions."""
    places = ("store/[!.]*", "champions/*", "work/*/progress/*", "runs/*/champion*")
    return [str(path) for place in places for path in home.glob(place)]


def says_it_all(message: str, visible: str) -> bool:
    parts = (f"CUDA_VISIBLE_DEVICES={visible}", f"driver {DRIVER}", f"torch {torch.__version__}", "build")
    return message.startswith("resources.gpus: ") and all(part in message for part in parts)


@pytest.mark.parametrize("command", [["run", "--plain"], ["plan", "--check"]])
def test_a_run_is_refused_before_anything_is_trained(
    tmp_path: Path, environment: dict[str, str], command: list[str]
) -> None:
    home = tmp_path / "home"
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.entry", *command, "--home", str(home), str(SMOKE), "resources.gpus=1"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == USER_ERROR, done.stdout + done.stderr
    (message,) = (line for line in done.stderr.splitlines() if "resources.gpus" in line)
    assert "1 devices are needed, nvidia-smi lists 2 and torch" in message
    assert f"can use 0: {gpu_fault()}; driver {DRIVER}" in message
    assert "Traceback" not in done.stderr + done.stdout
    assert left_in(home) == []


def gpu_fault() -> str:
    """torch's own words."""
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        torch.cuda.init()
    return str(caught.value).splitlines()[0]


@pytest.mark.parametrize("stage", ["base@0", "evaluation"])
def test_a_stage_that_misses_its_device_names_driver_build_and_variable(
    tmp_path: Path, environment: dict[str, str], graph: StageGraph, stage: str
) -> None:
    home = tmp_path / "home"
    node = graph.node("base@0")
    if stage == "evaluation":
        with Launcher(home, ResourcesConfig()) as launcher:
            launcher.run(graph, [node], silent)
        node = graph.evaluations("base@0")[0]
    before = left_in(home)
    spec = ProcessSpec.of(graph, [node], home, 1).write(Store(home).work(node.key), {})
    done = subprocess.run(
        [sys.executable, "-m", "flows.engines.worker", str(spec)],
        cwd=ROOT,
        env=environment | {"CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_SECONDS,
        check=False,
    )
    assert done.returncode == USER_ERROR, done.stderr
    told = json.loads((Store(home).work(node.key) / ERROR_FILE).read_text())
    assert says_it_all(told["message"], "0"), told
    assert f"error: {told['message']}" in done.stderr
    assert "Traceback" not in done.stderr
    assert left_in(home) == before


@pytest.mark.usefixtures("leased")
@pytest.mark.parametrize(("gpus", "visible"), [(1, "GPU-aaaa-0000"), (2, "GPU-aaaa-0000,GPU-bbbb-1111")])
def test_a_launched_stage_does_not_go_on_on_the_cpu(tmp_path: Path, graph: StageGraph, gpus: int, visible: str) -> None:
    home = tmp_path / "home"
    node = unmade(graph.node("base@0"), f"on {gpus}")
    with (
        Launcher(home, ResourcesConfig(gpus=gpus)) as launcher,
        pytest.raises(NodeFailedError) as caught,
    ):
        launcher.run(graph, [node], silent)
    assert caught.value.user_error and not caught.value.retryable
    assert says_it_all(caught.value.message, visible), caught.value.message
    assert left_in(home) == []
