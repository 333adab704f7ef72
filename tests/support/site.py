"""A home with its standing servers and a worker, its run file deployed, and a chat service that listens."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from uuid import UUID

import psutil
import yaml

from flows.servers.access import client_secret, home_secret
from tests.integration.run.test_pipeline import RUN
from tests.support.homes import clean_environment, with_databases

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun


class Hook(BaseHTTPRequestHandler):
    """A chat service's webhook."""

    heard: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        """Keep what is said."""
        self.heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Say nothing."""


class Site:
    """A home with its servers and a worker, and the API that a person's browser talks to."""

    def __init__(self, folder: Path, webhook: str) -> None:
        self.home, self.file = with_databases(folder / "home"), folder / "run.yaml"
        merge = RUN["merge"] | {"monitor": {"every": 1, "examples": 8}}
        # The scores of one of its runs are made by hand, which its shifts cannot be.
        evaluate = {**RUN["evaluate"], "shift": None}
        config = RUN | {"merge": merge, "evaluate": evaluate, "notify": {"events": ["failure", "promotion"]}}
        config |= {"gate": {"non_inferiority_margin": 0.99}}
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))
        clean = clean_environment()
        self.environment = clean | {"MOPD_WEBHOOK": webhook}
        self.log = (folder / "log").open("wb")
        self.folder = folder
        self.worker: subprocess.Popen[bytes] | None = None

    @property
    def pages(self) -> str:
        """Where Prefect's pages are; `mopd ui` chose the port."""
        return json.loads((self.home / "servers" / "prefect.json").read_text())["url"]

    @property
    def client(self) -> dict[str, str]:
        """The environment of a client of Prefect's."""
        place = {"PREFECT_API_URL": f"{self.pages}/api", "PREFECT_HOME": str(self.home / "prefect")}
        return self.environment | place | client_secret(self.home)

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start a command of `mopd` over the home, in a group of its own."""
        command = [sys.executable, "-m", "flows.cli.entry", *arguments, "--home", str(self.home)]
        return subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, cwd=self.folder, start_new_session=True
        )

    def mopd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `mopd` to its end."""
        command = [sys.executable, "-m", "flows.cli.entry", *arguments, "--home", str(self.home)]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=self.folder, check=False, timeout=400
        )

    @contextlib.contextmanager
    def prefect(self) -> Iterator["SyncPrefectClient"]:
        """Prefect's own client for its API, in this process."""
        from prefect.client.orchestration import SyncPrefectClient

        with SyncPrefectClient(f"{self.pages}/api", auth_string=home_secret(self.home)) as client:
            yield client

    def begin(self, overrides: list[str]) -> str:
        """Start a run of the deployment; its id."""
        with self.prefect() as client:
            deployment = client.read_deployment_by_name("mopd/tiny")
            run = client.create_flow_run_from_deployment(deployment.id, parameters={"overrides": overrides})
        return str(run.id)

    def run(self, run: str) -> "FlowRun":
        """What Prefect knows of a run."""
        with self.prefect() as client:
            return client.read_flow_run(UUID(run))

    def state(self, run: str) -> str:
        """The name of a run's state."""
        state = self.run(run).state
        assert state is not None
        return str(state.name)

    def steps_saved(self) -> int:
        """The latest step of which a stage's state is saved; 0 before."""
        return max((int(p.name.partition("-")[2]) for p in (self.home / "work").glob("*/progress/step-*")), default=0)

    def workers_of_stages(self) -> list[psutil.Process]:
        """The stages' processes that work for this home, not those of another test or person."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if "flows.engines.fork_server" in " ".join(process.info["cmdline"] or ())
            and (process.info["environ"] or {}).get("MOPD_HOME") == str(self.home)
        ]

    def flow(self, run: str) -> psutil.Process:
        """The process of a run, which Prefect's worker started."""
        return next(
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if "prefect.engine" in (process.info["cmdline"] or ())
            and (process.info["environ"] or {}).get("PREFECT__FLOW_RUN_ID") == run
        )

    def cancel(self, run: str) -> None:
        """What Cancel on its page does."""
        from prefect.states import Cancelling

        with self.prefect() as client:
            client.set_flow_run_state(UUID(run), Cancelling())
