"""A group of servers under supervision, with a program that only answers `/health`: restarts, ends, nothing left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from flows.engines import server_health, vllm_servers
from flows.engines.devices import Lease
from flows.engines.fork_client import ForkServer, ServerDiedError, child_environment
from flows.engines.server_health import Health, ask_health
from flows.engines.vllm_commands import ServerCommand
from flows.engines.vllm_servers import MOST_RESTARTS, VllmServerError, VllmServers
from tests.support import health_server
from tests.support.processes import ended, eventually

PROGRAM = (sys.executable, health_server.__file__)
ONE = ServerCommand("rollout", "a test", PROGRAM)


@pytest.fixture(scope="module")
def fork_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    running = ForkServer(tmp_path_factory.mktemp("server") / "log", child_environment(1), preload=())
    yield running
    running.close()


def up(servers: VllmServers) -> bool:
    servers.tend()
    return servers.ready()


def group(servers: VllmServers) -> list[int]:
    """Every process of a group's servers, those below them too."""
    leaders = [psutil.Process(child.pid) for child in servers.children]
    return [process.pid for leader in leaders for process in (leader, *leader.children(recursive=True))]


def test_servers_answer_at_urls_known_before_and_nothing_is_left_after_close(fork_server, tmp_path):
    servers = VllmServers([ONE, ONE], tmp_path)
    first, second = servers.urls["rollout"]
    assert first != second
    assert not servers.ready()
    with servers:
        servers.start(fork_server)
        eventually(lambda: up(servers))
        members = group(servers)
        assert len(members) == 4
    assert all(ended(pid) for pid in members)
    assert not ask_health(first).well
    assert servers.servers[0].log.parent == tmp_path / "servers"


def test_a_killed_server_comes_back_on_its_port_until_it_was_too_often(fork_server, tmp_path):
    said: list[str] = []
    with VllmServers([ONE], tmp_path, report=said.append) as servers:
        servers.start(fork_server)
        eventually(lambda: up(servers))
        url = servers.urls
        for restart in range(1, MOST_RESTARTS + 1):
            leader, engine = group(servers)
            os.kill(leader, signal.SIGKILL)
            eventually(
                lambda before=restart: (servers.tend(), sum("it is restarted" in line for line in said) == before)[1]
            )
            eventually(lambda left=engine: ended(left))
            assert f"was killed by signal 9; it is restarted ({restart} of {MOST_RESTARTS} times)" in said[-1]
            eventually(lambda: up(servers))
        assert servers.urls == url
        os.kill(group(servers)[0], signal.SIGKILL)
        with pytest.raises(VllmServerError, match=f"after {MOST_RESTARTS} restarts"):
            eventually(servers.tend)


def test_a_server_that_hangs_is_started_again(fork_server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_servers, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(server_health, "HEALTH_SECONDS", 0.2)
    monkeypatch.setattr(vllm_servers, "HUNG_SECONDS", 1.0)
    said: list[str] = []
    with VllmServers([ONE], tmp_path, report=said.append) as servers:
        servers.start(fork_server)
        eventually(lambda: up(servers))
        before = group(servers)
        os.kill(before[0], signal.SIGSTOP)
        eventually(lambda: (servers.tend(), any("it is restarted" in line for line in said))[1])
        assert any("has not answered for" in line for line in said)
        # The engine is killed with its leader, and ends when it is its turn.
        eventually(lambda: all(ended(pid) for pid in before))
        eventually(lambda: up(servers))


def test_a_server_that_takes_itself_out_of_service_is_started_again_at_once(fork_server, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_servers, "LOOK_SECONDS", 0.0)
    said: list[str] = []
    with VllmServers([ONE], tmp_path, report=said.append) as servers:
        servers.start(fork_server)
        eventually(lambda: up(servers))
        (server,) = servers.servers
        # One that is unwell and gives no fault of its own may recover.
        for body in (b"", b"busy", b'{"error": "busy"}', b"[]"):
            assert httpx.post(server.url, content=body).status_code == 200
            servers.tend()
            assert ask_health(server.url) == Health(well=False)
        assert server.restarts == 0 and len(said) == 2
        httpx.post(server.url, json={"fault": "weights of another shape"})
        assert ask_health(server.url) == Health(False, "weights of another shape")
        eventually(lambda: (servers.tend(), server.restarts == 1)[1])
        assert any(line.endswith("is out of service (weights of another shape); it is stopped") for line in said)
        eventually(lambda: up(servers))
        assert ask_health(server.url) == Health(well=True)


def test_servers_on_one_device_start_one_after_another(fork_server, tmp_path):
    shared = ServerCommand("teachers", "a test", PROGRAM, gpus=1, place=0)
    commands = [shared, ServerCommand("teachers", "alone", PROGRAM, gpus=1, place=1), shared, shared]
    locks = [os.open(tmp_path / name, os.O_RDWR | os.O_CREAT) for name in "ab"]
    said: list[str] = []
    with VllmServers(commands, tmp_path, lease=Lease(("GPU-a", "GPU-b"), tuple(locks)), report=said.append) as servers:
        first, alone, *others = servers.servers
        assert {server.lease.devices for server in (first, *others)} == {("GPU-a",)}
        assert alone.lease.devices == ("GPU-b",)

        def in_turn() -> bool:
            """Whether all are up; at no time are two of one device starting."""
            servers.tend()
            starting = [server for server in (first, *others) if server.child is not None and not server.answered]
            assert len(starting) <= 1
            return servers.ready()

        servers.start(fork_server)
        assert [server.child is not None for server in servers.servers] == [True, True, False, False]
        eventually(in_turn)
        assert [line.endswith("answers") for line in said if "alone" not in line] == [False, True] * 3
        # Two that are killed at once come back in turn, and the third is not disturbed.
        kept = group(servers)
        for server in (first, others[0]):
            assert server.child is not None and server.child.pid is not None
            os.kill(server.child.pid, signal.SIGKILL)
        eventually(lambda: (in_turn(), first.restarts + others[0].restarts)[1] == 2)
        eventually(in_turn)
        assert len(set(kept) & set(group(servers))) == 4
        assert sum("it is restarted" in line for line in said) == 2
        assert sum("is started; log" in line for line in said) == 4
    for lock in locks:
        os.close(lock)


def test_restarts_of_long_ago_are_forgiven(fork_server, tmp_path):
    with VllmServers([ONE], tmp_path) as servers:
        servers.start(fork_server)
        eventually(lambda: up(servers))
        (server,) = servers.servers
        server.recent = [time.monotonic() - vllm_servers.RESTARTS_SECONDS - 1] * MOST_RESTARTS
        os.kill(group(servers)[0], signal.SIGKILL)
        eventually(lambda: (servers.tend(), server.restarts == 1)[1])
        eventually(lambda: up(servers))
        assert len(server.recent) == 1


def test_a_server_that_never_answered_is_not_started_again(fork_server, tmp_path):
    command = ServerCommand("teachers", "nobody", (*PROGRAM, "--fail"))
    with VllmServers([command], tmp_path) as servers:
        servers.start(fork_server)
        with pytest.raises(VllmServerError, match=r"ended with code 1 before it answered:\nno such model") as caught:
            eventually(servers.tend)
    assert "no such model" in caught.value.log.read_text()
    assert not caught.value.passing


def test_stop_from_elsewhere_ends_them_and_none_is_started_again(fork_server, tmp_path):
    with VllmServers([ONE], tmp_path) as servers:
        servers.start(fork_server)
        eventually(lambda: up(servers))
        members = group(servers)
        servers.stop()
        eventually(lambda: all(ended(pid) for pid in members))
        servers.tend()
        assert not servers.ready()


def test_nothing_is_left_when_the_fork_server_is_killed(tmp_path):
    mortal = ForkServer(tmp_path / "forkserver.log", child_environment(1), preload=())
    with VllmServers([ONE], tmp_path) as servers:
        servers.start(mortal)
        eventually(lambda: up(servers))
        members = group(servers)
        os.kill(mortal.pid, signal.SIGKILL)
        with pytest.raises(ServerDiedError):
            eventually(servers.tend)
    eventually(lambda: all(ended(pid) for pid in members))
    mortal.close()


SUPERVISOR = """
import sys, time
from pathlib import Path
from flows.engines.fork_client import ForkServer, child_environment
from flows.engines.vllm_servers import VllmServers
from tests.integration.engines.test_server_group import ONE, group, up

home = Path(sys.argv[1])
with VllmServers([ONE], home) as servers:
    servers.start(ForkServer(home / "forkserver.log", child_environment(1), preload=()))
    while not up(servers):
        time.sleep(0.1)
    print(*group(servers), flush=True)
    time.sleep(600)
"""


def test_nothing_is_left_when_the_supervisor_is_killed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SUPERVISOR, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    members = [int(pid) for pid in process.stdout.readline().split()]
    assert len(members) == 2
    process.kill()
    process.wait()
    eventually(lambda: all(ended(pid) for pid in members))


def test_a_home_that_is_a_relative_path_keeps_its_logs(fork_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    servers = VllmServers([ONE], Path("home"))
    assert servers.servers[0].log.parent == tmp_path / "home" / "servers"
