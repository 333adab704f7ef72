"""The fork server: groups, graces and ends of its children; device locks that children hold."""

import fcntl
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from experts.errors import UserError
from flows.children import Child, ForkServer, ServerDiedError, child_environment
from flows.devices import DeviceLeases, WaitCancelledError
from tests.processes import ended, eventually


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    running = ForkServer(tmp_path_factory.mktemp("server") / "log", child_environment(1), preload=())
    yield running
    running.close()


# A leader that ends on SIGTERM, whose child does not.
STUBBORN = "(trap '' TERM; echo $BASHPID; while true; do sleep 0.2; done) & wait"


def started_with_grandchild(server: ForkServer, log: Path) -> tuple[Child, int]:
    child = server.start(log, command=["bash", "-c", STUBBORN])
    grandchild = int(eventually(lambda: log.exists() and log.read_text().strip()))
    child.wait(0.1)
    assert child.pid is not None
    return child, grandchild


def test_ending_a_job_ends_its_whole_group(server, tmp_path):
    child, grandchild = started_with_grandchild(server, tmp_path / "log")
    child.end(grace=10)
    assert child.wait(5) == -signal.SIGTERM
    eventually(lambda: ended(grandchild), within=2)


def test_a_leader_that_ignores_sigterm_is_killed_after_its_grace(server, tmp_path):
    child = server.start(
        tmp_path / "log", command=["bash", "-c", "trap '' TERM; echo up; while true; do sleep 1; done"]
    )
    eventually(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text())
    child.end(grace=0.5)
    assert child.wait(0.2) is None
    assert child.wait(5) == -signal.SIGKILL


def test_a_job_whose_supervisor_lets_go_is_ended(server, tmp_path):
    child, grandchild = started_with_grandchild(server, tmp_path / "log")
    child.close()
    assert eventually(lambda: ended(child.pid) and ended(grandchild), within=2)


def test_jobs_of_a_killed_server_die_and_are_reported(tmp_path):
    server = ForkServer(tmp_path / "server", child_environment(1), preload=())
    child = server.start(tmp_path / "log", command=["sleep", "60"])
    eventually(lambda: child.wait(0.1) or child.pid)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(ServerDiedError):
        child.wait(5)
    eventually(lambda: ended(child.pid), within=2)
    server.close()


def test_devices_are_leased_whole_and_free_when_their_holder_is_gone(server, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    leases = DeviceLeases(tmp_path)
    with pytest.raises(UserError, match="4 devices asked for, this machine shows 3"):
        leases.acquire(4)
    first = leases.acquire(2)
    assert first.environment == {"CUDA_VISIBLE_DEVICES": "2,5"}
    child = server.start(tmp_path / "log", command=["sleep", "60"], descriptors=first.descriptors)
    eventually(lambda: child.wait(0.1) or child.pid)
    first.close()
    with pytest.raises(WaitCancelledError):
        leases.acquire(2, cancelled=lambda: True)
    # The attempt for two let go of the one that was free.
    with (tmp_path / "devices" / "gpu-7.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child.pid, signal.SIGKILL)
    second = leases.acquire(3)
    assert second.devices == ("2", "5", "7")
    second.close()
