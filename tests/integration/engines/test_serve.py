"""`mopd serve` but for vLLM itself: its errors, what it prints, and what SIGTERM and SIGKILL leave behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from typer.testing import CliRunner, Result

import flows.cli.serve
from base.store.checkpoint import Store
from flows.cli.app import app
from flows.engines.vllm_commands import ServerCommand
from tests.support import health_server
from tests.support.processes import below, ended, eventually
from tests.unit.flows.run.test_vllm_servers import HOST, RUN, SAMPLED, made, planned, vllm_is_installed

__all__ = ["vllm_is_installed"]

ROOT = Path(__file__).parents[3]
PROGRAM = (sys.executable, health_server.__file__)


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """A run whose base and experts stand in the store, as far as a command needs them."""
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({**RUN, "merge": {**RUN["merge"], "objective": SAMPLED}}, sort_keys=False))
    made(planned(tmp_path, objective=SAMPLED), Store(tmp_path))
    return path


def serve(what: str, run_file: Path, *arguments: Any, home: Path | None = None) -> Result:
    words = ["serve", what, run_file, *arguments, "--home", home or run_file.parent]
    return CliRunner().invoke(app, [str(word) for word in words])


def mistake(result: Result) -> str:
    """The one message of a user's mistake."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    return result.stderr


def replaced(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Serve by another program than vLLM."""
    command = ServerCommand("rollout", "a test", arguments)
    monkeypatch.setattr(flows.cli.serve, "rollout_servers", lambda *asked: [command])


def test_a_run_without_a_merge_has_nothing_to_serve(run_file):
    assert f"{run_file}: the run has no merge, so there is nothing to serve" in mistake(
        serve("rollout", run_file, "merge=null")
    )


def test_a_merge_that_servers_cannot_teach_is_refused_before_they_start(run_file):
    assert "objective reverse_kl needs more of the teacher" in mistake(
        serve("teachers", run_file, "merge.objective.type=reverse_kl")
    )


def test_a_checkpoint_that_is_not_made_is_named_with_the_command_that_makes_it(run_file, tmp_path):
    home = tmp_path / "empty"
    said = mistake(serve("rollout", run_file, "--max-steps", 1, home=home))
    assert f"base@0: not in the store of {home} yet; `mopd run {run_file} --max-steps 1 --home {home}` makes it" in said
    said = mistake(serve("teachers", run_file, home=home))
    assert "experts/sort@0, experts/reverse@0, base@0: not in the store" in said


def test_another_seed_must_be_one_of_the_runs(run_file):
    assert "--seed 3: the run's seeds are 0" in mistake(serve("rollout", run_file, "--seed", 3))


def test_without_vllm_nothing_is_started(run_file, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *rest: None)
    assert "merge.teacher_backend: vLLM is not installed; `make setup-vllm`" in mistake(serve("teachers", run_file))


def test_a_named_port_that_is_taken_is_an_error(run_file):
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        listener.listen()
        taken = listener.getsockname()[1]
        said = mistake(serve("rollout", run_file, "--port", taken))
    assert f"vLLM server: port {taken} on {HOST} is taken; choose another one" in said


def test_a_server_that_does_not_come_up_shows_the_end_of_its_log(run_file, monkeypatch):
    replaced(monkeypatch, *PROGRAM, "--fail")
    said = mistake(serve("rollout", run_file))
    assert "(a test) ended with code 1 before it answered:\nno such model" in said


def test_a_server_that_takes_too_long_is_given_up(run_file, monkeypatch):
    replaced(monkeypatch, sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)")
    started = time.monotonic()
    said = mistake(serve("rollout", run_file, "merge.sampler.start_seconds=20"))
    assert "did not answer within 20 s:\nloading" in said
    assert time.monotonic() - started < 500
    assert below(psutil.Process(), "sleep(600)") == []


SERVE = """
import sys
import flows.cli.serve
from flows.cli.entry import main
from flows.engines.vllm_commands import ServerCommand
from tests.integration.engines.test_serve import PROGRAM

command = ServerCommand("rollout", "a test", PROGRAM)
rollout = lambda config, start, store, resources: [command] * resources.rollout_servers.count
flows.cli.serve.rollout_servers = rollout
main()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_when_it_is_ended(run_file, number, tmp_path):
    output = tmp_path / "output"
    with output.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, "serve", "rollout", run_file, "--count", "2", "--home", run_file.parent],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=out,
            stderr=out,
        )
    eventually(lambda: "Ctrl-C ends them." in output.read_text() or process.poll() is not None)
    assert process.poll() is None, output.read_text()
    printed = yaml.safe_load(output.read_text().split(".yaml:\n")[1].split("Ctrl-C")[0])
    assert printed["merge"] == {"sampler": {"backend": "vllm_server"}}
    assert len(set(printed["resources"]["rollout_servers"]["urls"])) == 2
    members = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
    # The fork server, and of each server its leader and what that started.
    assert len(members) == 5
    process.send_signal(number)
    assert process.wait(240) == (0 if number == signal.SIGTERM else -number)
    eventually(lambda: all(ended(pid) for pid in members))
