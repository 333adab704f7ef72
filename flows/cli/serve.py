"""`mopd serve`: standing vLLM servers for a run's merge, until Ctrl-C. Free of torch, prefect and vLLM itself."""

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import yaml

from base.errors import UserError
from base.signals import interruptible
from base.store.checkpoint import Store
from flows.engines.devices import DeviceLeases
from flows.engines.fork_client import ForkServer, ServerDiedError, child_environment
from flows.engines.threads import threads_beside
from flows.engines.vllm_commands import (
    ServerCommand,
    devices_of,
    parents,
    rollout_servers,
    teacher_servers,
    teachers_of,
)
from flows.engines.vllm_servers import HOST, VllmServerError, VllmServers, free_ports, tail
from flows.plan.nodes import Node, StageGraph
from flows.run.run_request import RunRequest
from flows.run_file.schema import STUDENT
from stages.config.distill import DistillConfig
from stages.config.roles import is_teacher

FIRST_PORT = 8100
LOG_FILE = "serve.log"
_SECONDS = 0.5


@dataclass(frozen=True)
class Place:
    """The address at which servers listen.

    Attributes:
        host: Host name or IP address.
        port: The first server's port, the others' follow; if absent, free ports are chosen.
    """

    host: str = HOST
    port: int | None = None

    def ports(self, count: int) -> list[int]:
        """The ports of `count` servers.

        Raises:
            UserError: a chosen port is in use.
        """
        return free_ports(self.host, count, self.port or FIRST_PORT, exact=self.port is not None)


@dataclass(frozen=True)
class _Merge:
    """The merge whose rollouts or teachers are served."""

    asked: RunRequest
    graph: StageGraph
    node: Node
    store: Store

    @classmethod
    def of(cls, asked: RunRequest, seed: int | None, backend: str) -> Self:
        """Read the run as it will be when it uses the servers, because not every merge can use them.

        Args:
            asked: The run as requested.
            seed: The merge's seed; the run's first when absent.
            backend: The assignment by which the run uses the servers.
        """
        if asked.graph().config.merge is None:
            raise UserError(f"{asked.file}: the run has no merge, so there is nothing to serve")
        graph = replace(asked, overrides=(*asked.overrides, backend)).graph()
        students = {node.seed: node for node in graph.nodes if node.name == STUDENT}
        wanted = graph.config.seeds[0] if seed is None else seed
        if wanted not in students:
            raise UserError(f"--seed {seed}: the run's seeds are {', '.join(map(str, students))}")
        return cls(asked, graph, students[wanted], Store(asked.home.resolve()))

    @property
    def config(self) -> DistillConfig:
        return DistillConfig.model_validate(self.node.config)

    def need(self, wanted: Callable[[str], bool]) -> Node:
        """The merge, reduced to the parents of the wanted roles.

        Raises:
            UserError: a parent is not in the store; the message names those that are missing.
        """
        roles = {role: parent for role, parent in self.node.parents.items() if wanted(role)}
        missing = [parent for parent in roles.values() if self.store.find(self.graph.node(parent).key) is None]
        if missing:
            names = ", ".join(dict.fromkeys(missing))
            raise UserError(f"{names}: not in the store of {self.asked.home} yet; `{self.asked.command}` makes it")
        return replace(self.node, parents=roles)


def rollout(asked: RunRequest, place: Place, *, count: int | None = None, seed: int | None = None) -> None:
    """Serve the rollouts of a run's merge until Ctrl-C or SIGTERM.

    Args:
        asked: The run.
        place: Where the servers listen.
        count: Number of servers; that of `resources.rollout_servers` when absent.
        seed: The merge's seed; the run's first when absent. Only the start's shape is used.

    Raises:
        UserError: there is no merge, a checkpoint is not made yet, vLLM is not installed, a port is in use, or a server
            fails.
    """
    merge = _Merge.of(asked, seed, "merge.sampler.backend=vllm_server")
    resources = merge.graph.config.resources
    if count is not None:
        settings = resources.rollout_servers.model_copy(update={"count": count})
        resources = resources.model_copy(update={"rollout_servers": settings})
    start = parents(merge.graph, merge.need(lambda role: role == "start"), merge.store)["start"]
    commands = rollout_servers(merge.config, start, merge.store, resources)
    _serve(merge, commands, place, "rollout_servers", {"sampler": {"backend": "vllm_server"}})


def teachers(asked: RunRequest, place: Place, *, seed: int | None = None) -> None:
    """Serve the teachers of a run's merge until Ctrl-C or SIGTERM; arguments and errors as for `rollout`."""
    merge = _Merge.of(asked, seed, "merge.teacher_backend=vllm_server")
    artifacts = teachers_of(parents(merge.graph, merge.need(is_teacher), merge.store))
    commands = teacher_servers(merge.config, artifacts, merge.store, merge.graph.config.resources)
    _serve(merge, commands, place, "teacher_servers", {"teacher_backend": "vllm_server"})


def _serve(merge: _Merge, commands: Sequence[ServerCommand], place: Place, key: str, backend: dict[str, Any]) -> None:
    home, config = merge.store.home, merge.graph.config
    ports = place.ports(len(commands))
    with interruptible(background=True), contextlib.ExitStack() as held:
        try:
            lease = DeviceLeases().acquire(devices_of(commands))
            held.callback(lease.close)
            log = home / "servers" / LOG_FILE
            fork_server = ForkServer(log, child_environment(threads_beside(config.resources)), preload=())
            held.callback(fork_server.close)
            servers = held.enter_context(
                VllmServers(commands, home, lease=lease, host=place.host, ports=ports, report=_print)
            )
            servers.start(fork_server)
            _wait_until_ready(servers, merge.config.sampler.start_seconds)
            urls = [server.url for server in servers.servers]
            _print(f"ready; a run uses these servers with the following in {merge.asked.file}:\n")
            _print(yaml.safe_dump({"merge": backend, "resources": {key: {"urls": urls}}}, default_flow_style=None))
            _print("Ctrl-C ends them.")
            while True:
                servers.tend()
                time.sleep(_SECONDS)
        except KeyboardInterrupt:
            _print("ending the servers")
        except VllmServerError as error:
            raise UserError(str(error)) from error
        except ServerDiedError as error:
            raise UserError(
                f"the process that supervises the servers was killed, and the servers with it (log: {log})"
            ) from error


def _wait_until_ready(servers: VllmServers, seconds: float) -> None:
    """Wait until all servers answer; those on the same devices start one after another, and each has the whole time."""
    deadline, most = time.monotonic() + seconds, 0
    servers.tend()
    while not servers.ready():
        if (answered := sum(server.answered for server in servers.servers)) > most:
            deadline, most = time.monotonic() + seconds, answered
        if time.monotonic() > deadline:
            late = next(server for server in servers.servers if not server.answered)
            message = f"{late.label} did not answer within {seconds:g} s:\n{tail(late.log)}"
            raise VllmServerError(message, late.log, passing=True)
        time.sleep(_SECONDS)
        servers.tend()


def _print(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
