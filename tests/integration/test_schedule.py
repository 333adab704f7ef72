"""A run on a schedule: deployed, checked, worked off, cancelled, resumed; with a standing server and a real worker."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import psutil
import pytest
import yaml

from flows.access import client_secret
from stages.core.checkpoint import Store
from stages.core.journal import read
from tests.integration.test_pipeline import RUN
from tests.processes import ended, eventually, listening
from tests.scored_home import finish, graph_of

ROOT = Path(__file__).parents[2]
LONG = {"base": {"pretrain": {"max_steps": 4000, "save_every": 20}}}
CANCEL_SECONDS = 10


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
        self.home, self.file = folder / "home", folder / "run.yaml"
        # The scores of one of its runs are made by hand, which its shifts cannot be.
        evaluate = {**RUN["evaluate"], "shift": None}
        config = RUN | {"notify": {"events": ["failure", "promotion"]}, "evaluate": evaluate}
        self.file.write_text(yaml.safe_dump(config, sort_keys=False))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "MOPD_"))}
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
        command = [sys.executable, "-m", "flows.cli", *arguments, "--home", str(self.home)]
        return subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, cwd=self.folder, start_new_session=True
        )

    def mopd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run a command of `mopd` to its end."""
        command = [sys.executable, "-m", "flows.cli", *arguments, "--home", str(self.home)]
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, cwd=self.folder, check=False, timeout=120
        )

    def ask(self, script: str) -> Any:
        """Ask Prefect's API with its own client: `client` and `deployment` are there; the answer is JSON."""
        head = (
            "import json, sys\nfrom prefect import get_client\nfrom prefect.states import Cancelling\n"
            "with get_client(sync_client=True) as client:\n"
            "    deployment = client.read_deployment_by_name('mopd/tiny')\n"
        )
        body = "".join(f"    {line}\n" for line in script.splitlines())
        done = subprocess.run(
            [sys.executable, "-c", head + body],
            env=self.client,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        return json.loads(done.stdout.splitlines()[-1])

    def begin(self, changes: dict[str, Any]) -> str:
        """Start a run of the deployment; its id."""
        run = f"client.create_flow_run_from_deployment(deployment.id, parameters={{'changes': {changes!r}}})"
        return self.ask(f"print(json.dumps(str({run}.id)))")

    def state(self, run: str) -> str:
        """The name of a run's state."""
        return self.ask(f"print(json.dumps(client.read_flow_run({run!r}).state.name))")

    def steps_saved(self) -> int:
        """The latest step of which a stage's state is saved; 0 before."""
        return max((int(p.name.partition("-")[2]) for p in (self.home / "work").glob("*/progress/step-*")), default=0)

    def workers_of_stages(self) -> list[psutil.Process]:
        """The stages' processes that work for this home, not those of another test or person."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "environ"])
            if "flows.forkserver" in " ".join(process.info["cmdline"] or ())
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
        self.ask(f"client.set_flow_run_state({run!r}, Cancelling())\nprint('null')")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    hook = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    threading.Thread(target=hook.serve_forever, daemon=True).start()
    site = Site(tmp_path_factory.mktemp("site"), f"http://127.0.0.1:{hook.server_address[1]}/secret-token")
    servers = site.servers = site.start("ui")
    try:
        eventually((site.home / "servers" / "prefect.json").exists, within=600)
        site.deployed = site.mopd("deploy", str(site.file), "--cron", "0 2 * * 1", "--timezone", "Europe/Berlin")
        site.worker = site.start("worker")
        yield site
    finally:
        for process in (site.worker, servers):
            if process is not None:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=60)
        hook.shutdown()


def test_a_deployment_says_when_it_runs_and_where_to_look(site: Site) -> None:
    assert site.deployed.returncode == 0, site.deployed.stderr
    assert f"deployment mopd/tiny: {site.pages}/deployments/deployment/" in site.deployed.stdout
    assert site.deployed.stdout.count("  next: Monday ") == 3
    facts = site.ask(
        "print(json.dumps([deployment.global_concurrency_limit.limit, deployment.enforce_parameter_schema,"
        " deployment.schedules[0].active, deployment.schedules[0].schedule.cron]))"
    )
    assert facts == [1, True, True, "0 2 * * 1"]


def test_nobody_else_on_the_network_reaches_the_pages(site: Site) -> None:
    assert listening(psutil.Process(site.servers.pid)) == {"127.0.0.1"}


def test_a_paused_schedule_waits_for_somebody_and_is_kept(site: Site) -> None:
    done = site.mopd("deploy", str(site.file), "name=resting", "--cron", "30 4 * * 2", "--paused")
    assert done.returncode == 0 and "schedule: 30 4 * * 2 (UTC), paused" in done.stdout
    look = (
        "found = client.read_deployment_by_name('mopd/resting')\n"
        "(each,) = found.schedules\n{}"
        "(now,) = client.read_deployment(found.id).schedules\n"
        "print(json.dumps([now.active, now.schedule.cron, now.schedule.timezone]))"
    )
    assert site.ask(look.format("")) == [False, "30 4 * * 2", "UTC"]
    resume = "client.update_deployment_schedule(found.id, each.id, active=True)\n"
    assert site.ask(look.format(resume)) == [True, "30 4 * * 2", "UTC"]
    assert site.mopd("deploy", str(site.file), "name=resting", "--remove").returncode == 0


def test_what_cannot_be_scheduled_is_said_without_a_traceback(site: Site) -> None:
    for arguments, said in (
        (["--cron", "0 2 * * x"], "--cron '0 2 * * x': Invalid cron string"),
        (["--cron", "0 2 * * 1", "--timezone", "Europe/Berln"], "did you mean 'Europe/Berlin'"),
        (["merge.max_step=3"], "did you mean 'max_steps'"),
    ):
        done = site.mopd("deploy", str(site.file), *arguments)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr


def test_wrong_parameters_are_refused_before_a_run_begins(site: Site) -> None:
    script = (
        "changes = {'experts': {'sort': {'train': {'rl': {'max_step': 3}}}}}\n"
        "try:\n"
        "    client.create_flow_run_from_deployment(deployment.id, parameters={'changes': changes})\n"
        "except Exception as error:\n"
        "    print(json.dumps(str(error)))\n"
    )
    said = site.ask(script)
    assert "changes.experts.sort.train.rl" in said and "'max_step' was unexpected" in said


def test_a_cancelled_run_stops_its_stage_and_the_next_goes_on_from_its_checkpoint(site: Site) -> None:
    first = site.begin(LONG)
    eventually(lambda: site.steps_saved() > 100, within=600)
    assert site.workers_of_stages()
    site.cancel(first)
    started = time.monotonic()
    eventually(lambda: not site.workers_of_stages(), within=60)
    assert time.monotonic() - started < CANCEL_SECONDS
    eventually(lambda: site.state(first) == "Cancelled", within=60)
    kept = site.steps_saved()
    assert kept > 100

    second = site.begin(LONG)
    eventually(lambda: site.steps_saved() > kept, within=600)
    site.cancel(second)
    eventually(lambda: site.state(second) == "Cancelled", within=60)
    (journal,) = (site.home / "work").glob("*/journal.jsonl")
    steps = [record["step"] for record in read(journal) if record["kind"] == "progress"]
    # It went on where it had been: no step stands twice.
    assert len(steps) == len(set(steps)) and max(steps) > kept


def test_a_run_that_outlived_its_worker_can_still_be_cancelled(site: Site) -> None:
    run = site.begin(LONG)
    eventually(site.workers_of_stages, within=600)
    flow = site.flow(run)
    assert site.worker is not None
    (prefect,) = psutil.Process(site.worker.pid).children()
    prefect.kill()
    # Prefect's worker is started again, and knows nothing of the run.
    eventually(lambda: [p for p in psutil.Process(site.worker.pid).children() if p.pid != prefect.pid], within=60)
    assert site.state(run) == "Running" and flow.is_running()
    site.cancel(run)
    eventually(lambda: site.state(run) == "Cancelled", within=90)
    eventually(lambda: ended(flow.pid) and not site.workers_of_stages())
    assert site.worker.poll() is None


def test_a_run_that_died_with_its_worker_does_not_keep_the_next_waiting(site: Site) -> None:
    lost = site.begin(LONG)
    eventually(site.workers_of_stages, within=600)
    flow = site.flow(lost)
    assert site.worker is not None
    site.worker.kill()
    site.worker.wait()
    flow.kill()
    eventually(lambda: ended(flow.pid) and not site.workers_of_stages())
    assert site.state(lost) == "Running"
    site.worker = site.start("worker")
    following = site.begin(LONG)
    eventually(lambda: site.state(lost) == "Crashed", within=120)
    eventually(lambda: site.state(following) == "Running", within=120)
    site.cancel(following)
    eventually(lambda: site.state(following) == "Cancelled", within=60)


def make_by_hand(site: Site) -> None:
    """Make what is missing of the run, with scores of experts and a student that learnt: a few steps teach nothing."""
    graph, store = graph_of(site.file, site.home), Store(site.home)
    for node in graph.nodes:
        if node.stage == "evaluate":
            shutil.rmtree(store.root / node.key, ignore_errors=True)
    finish(graph, site.home)


def test_a_scheduled_run_ends_with_a_champion_links_and_a_word_to_the_webhook(site: Site) -> None:
    make_by_hand(site)
    Hook.heard.clear()
    run, other = site.begin({}), site.begin({})
    eventually(lambda: site.state(run) in ("Completed", "Failed", "Crashed"), within=600)
    assert site.state(run) == "Completed"
    assert (site.home / "runs" / "tiny" / "champion.json").exists()
    (told,) = [each for each in Hook.heard if each["event"] == "promotion"]
    # Which of the two came first is the worker's choice.
    first = next(each for each in (run, other) if each in told["flow_run"])
    assert told["run"] == "tiny" and f"/flow-run/{first}" in told["flow_run"]
    assert "is champion" in told["text"] and told["mlflow"]
    # The other may have its link already.
    (page,) = site.ask(
        f"own = [a for a in client.read_artifacts() if str(a.flow_run_id) == {first!r}]\n"
        "print(json.dumps([a.data for a in own if 'in MLflow' in str(a.data)]))"
    )
    assert told["mlflow"].split()[0] in page
    from mlflow import MlflowClient

    tracked = MlflowClient(f"sqlite:///{site.home / 'mlflow.db'}").search_runs(["1"], "attributes.status = 'FINISHED'")
    assert told["flow_run"] in [each.data.tags.get("prefect") for each in tracked], "from MLflow to Prefect"
    # One waited for the other, and found everything made.
    eventually(lambda: site.state(other) in ("Completed", "Failed", "Crashed"), within=600)
    assert site.state(other) == "Completed"
    ends = site.ask(
        f"a, b = client.read_flow_run({run!r}), client.read_flow_run({other!r})\n"
        "print(json.dumps(b.start_time >= a.end_time or a.start_time >= b.end_time))"
    )
    assert ends is True


def test_a_run_that_fails_tells_the_webhook_and_no_secret_is_kept(site: Site) -> None:
    Hook.heard.clear()
    run = site.begin({"experts": {"sort": {"train": {"rl": {"optimizer": {"learning_rate": 1e30}}}}}})
    eventually(lambda: site.state(run) in ("Completed", "Failed", "Crashed"), within=600)
    assert site.state(run) == "Failed"
    (told,) = Hook.heard
    assert told["event"] == "failure" and "tiny failed: " in told["text"] and "experts/sort" in told["error"]
    kept = [p for p in site.home.rglob("*") if p.is_file() and b"secret-token" in p.read_bytes()]
    assert kept == []


def test_the_deployments_of_a_team_are_declared_in_one_file(site: Site) -> None:
    folders = {"MOPD_HOME": str(site.home), "MOPD_CHECKOUT": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deploy/prefect.yaml"],
        env=site.client | folders,
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    facts = site.ask(
        "found = client.read_deployment_by_name('mopd/lab')\n"
        "print(json.dumps([found.schedules[0].schedule.cron, found.parameters, found.enforce_parameter_schema,"
        " found.global_concurrency_limit.limit, 'merge' in str(found.parameter_openapi_schema)]))"
    )
    parameters = {"run_file": "flows/runs/lab.yaml", "home": str(site.home), "plain": True}
    assert facts == ["0 2 * * 1", parameters, True, 1, True]


def test_a_schedule_begins_runs_by_itself(site: Site) -> None:
    done = site.mopd("deploy", str(site.file), "name=ticking", "--cron", "* * * * *")
    assert done.returncode == 0, done.stderr
    look = (
        "from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId\n"
        "found = client.read_deployment_by_name('mopd/ticking')\n"
        "mine = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[found.id]))\n"
        "runs = client.read_flow_runs(flow_run_filter=mine)\n"
        "print(json.dumps([[str(run.id), run.auto_scheduled, run.state.name] for run in runs]))"
    )
    # The next one waits for its turn where a busy worker took up two at once.
    waiting = ("Scheduled", "Late", "AwaitingConcurrencySlot")
    begun = eventually(lambda: [run for run in site.ask(look) if run[2] not in waiting], within=180)
    assert [run[1] for run in begun] == [True]
    eventually(lambda: site.state(begun[0][0]) in ("Completed", "Failed", "Crashed"), within=600)
    assert site.state(begun[0][0]) == "Completed"
    assert site.mopd("deploy", str(site.file), "name=ticking", "--remove").returncode == 0
