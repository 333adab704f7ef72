"""Which flow runs are taken for dead, and which are cancelled, on a real server and with real processes."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Cancelling, Completed, Pending, Running, State

from base.listeners import start_of
from flows.run import crashed_runs
from flows.run.crashed_runs import CrashDetector, Processes, mark_crashed_runs, run_tags, worker_name
from flows.run.deploy import _look
from flows.servers import start as servers
from tests.support.processes import eventually, prefect_of

SLEEP = [sys.executable, "-c", "import time; time.sleep(120)"]


@flow(name=crashed_runs.FLOW)
def nothing() -> None:
    """Stands for the pipeline."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.Server]:
    home = tmp_path_factory.mktemp("home")
    with prefect_of(home, 23700) as server:
        yield server


@pytest.fixture
def client(server: servers.Server) -> Iterator[SyncPrefectClient]:
    with get_client(sync_client=True) as client:
        yield client
        for run in client.read_flow_runs():
            client.delete_flow_run(run.id)


@pytest.fixture
def process() -> Iterator[Callable[..., "subprocess.Popen[bytes]"]]:
    """Starts a process that sleeps, with these words behind its command and these variables."""
    begun: list[subprocess.Popen[bytes]] = []

    def start(*words: str, **variables: str) -> "subprocess.Popen[bytes]":
        begun.append(subprocess.Popen([*SLEEP, *words], env=os.environ | variables))
        return begun[-1]

    yield start
    for each in begun:
        each.kill()
        each.wait()


def gone() -> "subprocess.Popen[bytes]":
    """A process that has been."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process


def tag_of(pid: int, host: str = os.uname().nodename, start: int | None = None) -> str:
    return f"process:{host}:{pid}:{start_of(pid) if start is None else start}"


def begin(client: SyncPrefectClient, state: State[Any], *tags: str, worker: str = "") -> FlowRun:
    """A run in this state, of a deployment where a worker began it."""
    if worker:
        deployment = client.create_deployment(client.create_flow(nothing), "tiny")
        run = client.create_flow_run_from_deployment(deployment, tags=tags)
        client.update_flow_run_labels(run.id, {crashed_runs.WORKER_LABEL: worker})
    else:
        run = client.create_flow_run(nothing, tags=tags)
    if state.is_cancelling():
        # A scheduled one would be cancelled at once.
        client.set_flow_run_state(run.id, Running(), force=True)
    client.set_flow_run_state(run.id, state, force=True)
    return run


def state(client: SyncPrefectClient, run: FlowRun) -> str:
    return client.read_flow_run(run.id).state.name


def later(detector: CrashDetector) -> None:
    """Move every first sighting of a detector back by an hour."""
    detector.since = {key: first - 3600 for key, first in detector.since.items()}


def test_a_run_whose_process_is_gone_is_crashed_and_one_that_lives_or_is_elsewhere_is_not(client, process):
    alive = process()
    lost = begin(client, Running(), *run_tags("a")[:1], tag_of(gone().pid, start=7))
    reused = begin(client, Running(), "mopd:a", tag_of(alive.pid, start=start_of(alive.pid) - 1))
    others = [
        begin(client, Running(), "mopd:a", tag_of(alive.pid)),
        begin(client, Running(), "mopd:a", tag_of(gone().pid, "elsewhere", 7)),
        begin(client, Running(), "process:of a person"),
        begin(client, Pending()),
    ]
    detector = CrashDetector()
    assert len(detector.look()) == 2
    assert [state(client, run) for run in (lost, reused)] == ["Crashed", "Crashed"]
    later(detector)
    assert detector.look() == []
    assert {state(client, run) for run in others} == {"Running", "Pending"}


def test_a_new_run_of_a_name_marks_those_of_that_name(client):
    mine, other = (begin(client, Running(), f"mopd:{name}", tag_of(gone().pid, start=7)) for name in "ab")
    assert mark_crashed_runs("a") == 1
    assert [state(client, run) for run in (mine, other)] == ["Crashed", "Running"]


def test_no_setting_of_the_clock_moves_the_start_of_a_process(process):
    alive = process()
    stat = Path(f"/proc/{alive.pid}/stat").read_text()
    assert f" {start_of(alive.pid)} " in stat and start_of(gone().pid) == 0
    alive.send_signal(signal.SIGKILL)
    eventually(lambda: start_of(alive.pid) == 0)
    assert Path(f"/proc/{alive.pid}").exists(), "dead and not reaped: no process to wait for"


def test_a_run_that_starts_slowly_is_let_be_while_its_worker_or_its_process_lives(client, process):
    working = worker_name()
    process(working)
    of_a_worker = begin(client, Pending(), worker=working)
    slow = begin(client, Pending(), worker=worker_name())
    process(PREFECT__FLOW_RUN_ID=str(slow.id))
    again = begin(client, Pending(), tag_of(gone().pid, start=7), worker=working)
    foreign = begin(client, Pending(), tag_of(gone().pid, start=7), worker="ProcessWorker 1")
    distant = begin(client, Pending(), worker="mopd-elsewhere-12345678")
    detector = CrashDetector()
    detector.look()
    later(detector)
    assert detector.look() == []
    assert {state(client, run) for run in (of_a_worker, slow, again, foreign, distant)} == {"Pending"}


def test_a_run_whose_worker_died_before_its_process_began_is_crashed_once_that_is_sure(client):
    lost = begin(client, Pending(), worker=worker_name())
    detector = CrashDetector()
    detector.look()
    assert state(client, lost) == "Pending"
    later(detector)
    assert len(detector.look()) == 1
    assert state(client, lost) == "Crashed"


def test_a_run_begun_again_elsewhere_is_not_judged_by_its_former_process(client):
    run = begin(client, Running(), tag_of(gone().pid, start=7), worker="mopd-elsewhere-12345678")
    assert CrashDetector().look() == []
    assert state(client, run) == "Running"


def test_a_run_to_be_cancelled_whose_worker_is_gone_is_told_once_and_cancelled_when_its_process_is(client, process):
    alive = process()
    run = begin(client, Cancelling(), tag_of(alive.pid), worker=worker_name())
    detector = CrashDetector()
    assert "was sent SIGTERM" in detector.look()[0]
    assert alive.wait(240) == -signal.SIGTERM
    assert state(client, run) == "Cancelling"
    assert "cancelled" in detector.look()[0]
    assert state(client, run) == "Cancelled"


def test_nobody_is_told_twice_to_end(client):
    twice = "import signal, time; signal.signal(15, lambda *_: print('told', flush=True)); print('ready', flush=True)"
    with subprocess.Popen([sys.executable, "-c", f"{twice}; [time.sleep(1) for _ in range(600)]"], stdout=-1) as alive:
        try:
            assert alive.stdout is not None and alive.stdout.readline() == b"ready\n"
            begin(client, Cancelling(), tag_of(alive.pid))
            first, second = CrashDetector(), CrashDetector()
            assert len(first.look()) == 1 and second.look() == []
            later(first)
            assert first.look() == []
            assert alive.stdout.readline() == b"told\n"
        finally:
            alive.kill()
        assert alive.stdout.read() == b""


def test_a_run_below_a_living_worker_is_left_to_it_for_a_while(client):
    program = "import subprocess, sys; p = subprocess.Popen(['sleep', '99']); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen([sys.executable, "-c", program, "prefect", "worker", "start"], stdout=-1) as worker:
        assert worker.stdout is not None
        pid = int(worker.stdout.readline())
        run = begin(client, Cancelling(), tag_of(pid))
        detector = CrashDetector()
        assert detector.look() == [] and start_of(pid)
        later(detector)
        assert len(detector.look()) == 1
        worker.wait(240)
    assert len(detector.look()) == 1 and state(client, run) == "Cancelled"


def test_a_run_that_ended_or_was_deleted_meanwhile_is_let_be(client):
    ended, deleted = (begin(client, Running(), tag_of(gone().pid, start=7)) for _ in range(2))
    stale = [client.read_flow_run(run.id) for run in (ended, deleted)]
    client.set_flow_run_state(ended.id, Completed(), force=True)
    client.delete_flow_run(deleted.id)
    assert [crashed_runs._settle(client, run, Cancelling()) for run in stale] == [False, False]
    assert state(client, ended) == "Completed"


def test_a_server_that_is_away_stops_no_worker(server, caplog):
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}), caplog.at_level("DEBUG", "flows.run.deploy"):
        _look(CrashDetector())
    assert "did not answer" in caplog.text


def test_the_process_of_another_user_counts_by_its_id(client):
    run = client.create_flow_run(nothing)
    client.update_flow_run(run.id, infrastructure_pid=str(os.getpid()))
    processes = Processes()
    assert not processes.any_of(client.read_flow_run(run.id))
    for each in processes._all:
        each.info["environ"] = None
    assert processes.any_of(client.read_flow_run(run.id))
    client.update_flow_run(run.id, infrastructure_pid=str(uuid4().int))
    assert not processes.any_of(client.read_flow_run(run.id))
