"""The fork server: groups, graces and ends of its children; device locks that children hold."""

import contextlib
import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from base.errors import UserError
from flows.engines.devices import DeviceLeases, WaitCancelledError, host_devices, lock_folder
from flows.engines.fork_client import Child, ForkServer, ServerDiedError, child_environment
from tests.support.devices import stand_in_driver
from tests.support.processes import ended, eventually


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
    assert child.wait(240) == -signal.SIGTERM
    eventually(lambda: ended(grandchild))


def test_a_leader_that_ignores_sigterm_is_killed_after_its_grace(server, tmp_path):
    child = server.start(
        tmp_path / "log", command=["bash", "-c", "trap '' TERM; echo up; while true; do sleep 1; done"]
    )
    eventually(lambda: (tmp_path / "log").exists() and (tmp_path / "log").read_text())
    child.end(grace=5)
    assert child.wait(0.2) is None
    assert child.wait(240) == -signal.SIGKILL


def test_a_job_whose_supervisor_lets_go_is_ended(server, tmp_path):
    child, grandchild = started_with_grandchild(server, tmp_path / "log")
    child.close()
    assert eventually(lambda: ended(child.pid) and ended(grandchild))


def test_jobs_of_a_killed_server_die_and_are_reported(tmp_path):
    server = ForkServer(tmp_path / "server", child_environment(1), preload=())
    child = server.start(tmp_path / "log", command=["sleep", "900"])
    eventually(lambda: child.wait(0.1) or child.pid)
    os.kill(server.pid, signal.SIGKILL)
    with pytest.raises(ServerDiedError):
        child.wait(240)
    eventually(lambda: ended(child.pid))
    server.close()


def test_threads_sleep_while_they_wait_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    for own, expected in ((None, "PASSIVE"), ("ACTIVE", "ACTIVE")):
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        if own:
            monkeypatch.setenv("OMP_WAIT_POLICY", own)
        server, log = ForkServer(tmp_path / "server", child_environment(2), preload=()), tmp_path / f"log-{expected}"
        assert server.start(log, command=["sh", "-c", "echo $OMP_WAIT_POLICY $OMP_NUM_THREADS"]).wait(240) == 0
        server.close()
        assert log.read_text().split() == [expected, "2"]


@pytest.fixture
def locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host of one's own, whose driver tells nothing."""
    monkeypatch.setenv("MOPD_DEVICE_LOCKS", str(tmp_path / "locks"))
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    return tmp_path / "locks"


def given_up() -> bool:
    return True


def test_devices_are_leased_whole_and_free_when_their_holder_is_gone(server, tmp_path, locks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5,7")
    leases = DeviceLeases()
    with pytest.raises(UserError, match="4 devices are needed, but this machine has 3"):
        leases.acquire(4)
    first = leases.acquire(2)
    # No driver lists these, so they keep their names, and an index means what nvidia-smi means.
    assert first.environment == {"CUDA_VISIBLE_DEVICES": "2,5", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
    asked = {"environment": first.environment, "descriptors": first.descriptors}
    child = server.start(tmp_path / "log", command=["/bin/sleep", "60"], **asked)
    # The kernel's own word on what the job was given.
    job = psutil.Process(eventually(lambda: child.wait(0.1) or child.pid))
    eventually(lambda: job.cmdline() == ["/bin/sleep", "60"])
    assert job.environ()["CUDA_VISIBLE_DEVICES"] == "2,5"
    first.close()
    with pytest.raises(WaitCancelledError):
        leases.acquire(2, cancelled=given_up)
    # The attempt for two let go of the one that was free.
    with (locks / "gpu-7.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(child.pid, signal.SIGKILL)
    second = leases.acquire(3)
    assert second.devices == ("2", "5", "7")
    second.close()


def test_two_runs_never_lease_the_same_device(locks, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    one, other = DeviceLeases(), DeviceLeases()
    with contextlib.closing(one.acquire(2)) as lease:
        with contextlib.closing(other.acquire(1)) as rest:
            assert set(lease.devices) | set(rest.devices) == {"0", "1", "2"}
        with pytest.raises(WaitCancelledError):
            other.acquire(2, cancelled=given_up)


LISTED = """GPU 0: NVIDIA A100 (UUID: GPU-aaaa-0000)
  MIG 1g.10gb     Device  0: (UUID: MIG-cccc-0000)
GPU 1: NVIDIA A100 (UUID: GPU-bbbb-1111)"""


@pytest.mark.parametrize("other", ["GPU-bbbb-1111", "GPU-bb", "1"])
def test_a_device_is_the_same_by_its_index_and_by_its_uuid(tmp_path, locks, monkeypatch, other):
    monkeypatch.setenv("PATH", stand_in_driver(tmp_path / "driver", LISTED))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    leases = DeviceLeases()
    with contextlib.closing(leases.acquire(1)) as lease:
        # The child is given the UUID, whatever name this process was given.
        assert lease.environment["CUDA_VISIBLE_DEVICES"] == "GPU-bbbb-1111"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", other)
        with pytest.raises(WaitCancelledError):
            leases.acquire(1, cancelled=given_up)
    leases.acquire(1).close()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{other}")
    with pytest.raises(UserError, match="2 devices are needed, but this machine has 1"):
        leases.acquire(2, cancelled=given_up)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    # Of a divided device a process is given a slice, also where the device is named.
    assert host_devices() == ["MIG-cccc-0000", "GPU-bbbb-1111"]
    for name in ("0", "GPU-aaaa", "MIG-cccc-0000"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", name)
        assert host_devices() == ["MIG-cccc-0000"]


def test_why_there_are_too_few_devices_is_in_the_message(tmp_path, locks, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    with pytest.raises(UserError, match=r"this machine has 0 \(nvidia-smi is not installed\); a stage"):
        DeviceLeases().acquire(1)
    fault = "Failed to initialize NVML: Driver/library version mismatch"
    monkeypatch.setenv("PATH", f"{stand_in_driver(tmp_path / 'driver', fails=fault)}:/bin")
    with pytest.raises(UserError, match=rf"1 devices are needed, but this machine has 0 \(nvidia-smi: {fault}\)"):
        DeviceLeases().acquire(1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(UserError, match=r"this machine has 1 \(CUDA_VISIBLE_DEVICES=3\)"):
        DeviceLeases().acquire(2)


def test_locks_are_the_hosts_and_the_users_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("MOPD_DEVICE_LOCKS", raising=False)
    assert lock_folder() == Path(tempfile.gettempdir()) / f"mopd-{os.getuid()}" / "devices"
