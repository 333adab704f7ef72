"""Chaos: `python -m tests.chaos --points 50` kills what a scheduled run lives on, at random moments, with SIGKILL.

The flow, a stage, the MLflow server, the Prefect server and the worker of the smoke pipeline are killed, ten times a
run; servers and workers are started again as a supervisor would, and a run that ended is begun again as a person
would. In the end every artifact must be, bit for bit, that of an undisturbed run at the same thread count; nothing may
be left in staging, no process that served the home may live on, and no lock be held.
"""

import argparse
import base64
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any

import psutil

from base.store.checkpoint import Store, hash_file
from flows.servers.access import client_secret, home_secret
from flows.servers.start import Server, choose_port, start_mlflow, start_prefect, stop, wait_until_ready
from tests.support.homes import clean_environment, with_databases

ROOT = Path(__file__).resolve().parents[1]
RUN_FILE = ROOT / "flows" / "runs" / "smoke.yaml"
VICTIMS = ("flow", "stage", "mlflow", "prefect", "worker")
POINTS_PER_RUN = 10
OFFLINE = {"HF_HUB_OFFLINE": "1"}
# Between two kills of one run, in seconds.
PAUSE = (1.0, 6.0)
PATIENCE_SECONDS = 900
BUSY_TRIES = 30
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


@dataclass
class Record:
    """What one run went through.

    Attributes:
        kills: Victim and the second of the run it was killed at.
        begun: How often the run had to be begun.
        seconds: From the first beginning to the end.
        spared: Victims that were no longer there to be killed: a finished run has no stage.
        differing: Nodes whose checkpoint is not that of the undisturbed run.
        faults: What else is wrong; empty when all is well.
    """

    kills: list[tuple[str, float]] = field(default_factory=list)
    begun: int = 0
    seconds: float = 0.0
    spared: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


class Site:
    """A home with a standing MLflow server, a standing Prefect server, a worker, and one run on it."""

    def __init__(self, home: Path) -> None:
        self.home = with_databases(home.resolve())
        self.ports = {name: choose_port("127.0.0.1", 6100 + offset, name) for offset, name in ((0, "a"), (100, "b"))}
        self.servers: dict[str, Server] = {}
        self.worker: subprocess.Popen[bytes] | None = None
        self.run_id = ""
        self.api = f"http://127.0.0.1:{self.ports['b']}/api"
        own = {"PREFECT_API_URL": self.api, "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{self.ports['a']}"}
        self.environment = clean_environment() | OFFLINE | own | {"PREFECT_HOME": str(self.home / "prefect")}
        self.environment |= client_secret(self.home)
        self.log = (self.home / "chaos.log").open("ab")

    def start(self, name: str) -> None:
        """Start a server or the worker, as a supervisor does; waits until a server answers."""
        if name == "worker":
            self.worker = self._mopd("worker")
            return
        starter, port = (start_mlflow, "a") if name == "mlflow" else (start_prefect, "b")
        self.servers[name] = starter(self.home, "127.0.0.1", self.ports[port])
        wait_until_ready(self.servers[name])

    def deploy(self) -> None:
        """Deploy the smoke pipeline."""
        process = self._mopd("deploy", str(RUN_FILE))
        assert process.wait(timeout=120) == 0, (self.home / "chaos.log").read_text()[-2000:]

    def begin(self) -> None:
        """Begin a run of the deployment, as Run on its page does."""
        name = self.request("GET", "/deployments/name/mopd/smoke")
        self.run_id = self.request("POST", f"/deployments/{name['id']}/create_flow_run", {})["id"]

    def state(self) -> str:
        """Type of the run's state."""
        return str(self.request("GET", f"/flow_runs/{self.run_id}")["state_type"])

    def request(self, method: str, path: str, body: Any = None) -> Any:
        """Ask Prefect's API; again while it is busy (503), as a person would."""
        data = json.dumps(body).encode() if body is not None else None
        known = base64.b64encode(home_secret(self.home).encode()).decode()
        headers = {"Content-Type": "application/json", "Authorization": f"Basic {known}"}
        asked = urllib.request.Request(self.api + path, data, headers, method=method)
        for _ in range(BUSY_TRIES):
            try:
                with urllib.request.urlopen(asked, timeout=30) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                if error.code != HTTPStatus.SERVICE_UNAVAILABLE:
                    raise
                time.sleep(1)
        raise AssertionError(f"{self.api}{path} was busy {BUSY_TRIES} times")

    def flow(self) -> psutil.Process | None:
        """The process of the run's flow."""
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.info["cmdline"] or ())
                if "prefect" in line and process.environ().get("PREFECT__FLOW_RUN_ID", "").replace("-", "") == (
                    self.run_id.replace("-", "")
                ):
                    return process
        return None

    def stage(self) -> psutil.Process | None:
        """A process that trains or evaluates."""
        flow = self.flow()
        with contextlib.suppress(psutil.Error):
            found = [job for server in flow.children() for job in server.children()] if flow else []
            return found[0] if found else None
        return None

    def kill(self, victim: str) -> bool:
        """Kill with SIGKILL; says whether there was somebody to kill. Servers and workers are started again."""
        if victim in ("flow", "stage"):
            process = self.flow() if victim == "flow" else self.stage()
            if process is None:
                return False
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
            return True
        if victim == "worker":
            assert self.worker is not None
            self.worker.kill()
            self.worker.wait()
        else:
            os.killpg(self.servers[victim].process.pid, signal.SIGKILL)
            self.servers[victim].process.wait()
        time.sleep(1)
        self.start(victim)
        return True

    def supervise(self) -> None:
        """Start a worker again that ended by itself, as `Restart=always` does: one that starts while its server is away
        says so and ends."""
        if self.worker is not None and self.worker.poll() is not None:
            self.start("worker")

    def close(self) -> None:
        """End worker and servers in good order."""
        if self.worker is not None:
            self.worker.terminate()
            self.worker.wait(timeout=60)
        stop(list(self.servers.values()))

    def survivors(self) -> list[str]:
        """Processes that still serve the home."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.info["cmdline"] or ()) + " ".join(process.environ().values())
                if str(self.home) in words and process.status() != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                    found.append(f"{process.pid} {' '.join(process.info['cmdline'])[:120]}")
        return found

    def held_locks(self) -> list[str]:
        """Locks that somebody holds."""
        held = []
        for path in (self.home / "locks").glob("*.lock"):
            try:
                with Store(self.home).lock(path.stem).acquire(timeout=0):
                    pass
            except TimeoutError:
                held.append(path.stem)
        return held

    def _mopd(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "flows.cli.entry", *arguments, "--home", str(self.home)]
        return subprocess.Popen(
            command, env=self.environment, stdout=self.log, stderr=self.log, cwd=ROOT, start_new_session=True
        )


def digests(home: Path) -> dict[str, str]:
    """node -> digest of its artifact, every file hashed anew."""
    found = {}
    for artifact in Store(home).artifacts():
        for name, expected in artifact.manifest["files"].items():
            assert hash_file(artifact.path / name) == expected, f"{artifact.name}: {name} is half written"
        found[f"{artifact.name}@{artifact.manifest['seed']}"] = artifact.digest
    return found


@contextlib.contextmanager
def site(home: Path) -> Iterator[Site]:
    """A site with everything started and the pipeline deployed."""
    place = Site(home)
    try:
        for name in ("mlflow", "prefect"):
            place.start(name)
        place.deploy()
        place.start("worker")
        yield place
    finally:
        place.close()


def disturbed(home: Path, victims: list[str], rng: random.Random, expected: dict[str, str]) -> Record:
    """Let a run come to its end while its victims are killed one after the other.

    Args:
        home: A new folder.
        victims: Whom to kill, in this order; who is not there when its turn comes, later.
        rng: When.
        expected: The digests of an undisturbed run.
    """
    record, waiting = Record(), list(victims)
    with site(home) as place:
        started = time.monotonic()
        place.begin()
        record.begun = 1
        next_kill = time.monotonic() + 4 + rng.uniform(*PAUSE)
        while True:
            time.sleep(0.2)
            assert time.monotonic() < started + PATIENCE_SECONDS, (home / "chaos.log").read_text()[-3000:]
            place.supervise()
            over = _is_over(place)
            if over == "COMPLETED" and set(waiting) <= {"stage"}:
                record.spared = waiting
                break
            if over == "COMPLETED":
                # The run was faster than its killers: those who are left find it finished, and it must stay so.
                place.begin()
                record.begun += 1
                next_kill = time.monotonic() + rng.uniform(*PAUSE)
            elif over:
                place.begin()
                record.begun += 1
            if time.monotonic() < next_kill:
                continue
            killed = next((victim for victim in dict.fromkeys(waiting) if place.kill(victim)), None)
            if killed is not None:
                waiting.remove(killed)
                record.kills.append((killed, round(time.monotonic() - started, 1)))
                next_kill = time.monotonic() + rng.uniform(*PAUSE)
        record.seconds = round(time.monotonic() - started, 1)
        found = digests(place.home)
        record.differing = sorted(node for node in {*found, *expected} if found.get(node) != expected.get(node))
    time.sleep(1)
    record.faults += [f"left in staging: {path.name}" for path in (place.home / "store" / ".staging").iterdir()]
    record.faults += [f"lives on: {process}" for process in place.survivors()]
    record.faults += [f"lock held: {name}" for name in place.held_locks()]
    return record


def undisturbed(home: Path) -> tuple[dict[str, str], float]:
    """The digests of a run from a terminal that nobody disturbs, and how long it took."""
    started, home = time.monotonic(), with_databases(home.resolve())
    command = [sys.executable, "-m", "flows.cli.entry", "run", "--plain", str(RUN_FILE), "--home", str(home)]
    environment = clean_environment() | OFFLINE
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return digests(home), time.monotonic() - started


def _is_over(place: Site) -> str:
    """How a run ended; empty while it goes on. One whose process is gone is over, whatever Prefect still believes."""
    state = place.state()
    if state in ENDED:
        return state
    if state == "RUNNING" and place.flow() is None:
        time.sleep(2)
        if place.flow() is None and (state := place.state()) == "RUNNING":
            return "CRASHED"
    return ""


def draw_victims(points: int, rng: random.Random) -> list[list[str]]:
    """Victims of each run: all kinds equally often, in random order."""
    victims = [VICTIMS[number % len(VICTIMS)] for number in range(points)]
    rng.shuffle(victims)
    return [victims[start : start + POINTS_PER_RUN] for start in range(0, points, POINTS_PER_RUN)]


def main() -> None:
    """Run the chaos and print a table; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--points", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=Path(".mopd/chaos"))
    asked = parser.parse_args()
    shutil.rmtree(asked.folder, ignore_errors=True)
    rng = random.Random(asked.seed)
    expected, alone = undisturbed(asked.folder / "undisturbed")
    print(f"undisturbed: {alone:.0f} s, {len(expected)} artifacts, student {expected['student@0'][:12]}", flush=True)
    records: list[Record] = []
    waiting = draw_victims(asked.points, rng)
    while waiting:
        number, victims = len(records), waiting.pop(0)
        record = disturbed(asked.folder / f"run{number}", victims, rng, expected)
        records.append(record)
        if record.spared:
            waiting.append(record.spared)
        killed = ", ".join(f"{victim} at {second} s" for victim, second in record.kills)
        verdict = "same digests" if not record.differing else f"DIFFERENT: {', '.join(record.differing)}"
        print(f"run {number}: {record.seconds} s, begun {record.begun} times, {verdict}; killed: {killed}", flush=True)
        for fault in record.faults:
            print(f"  FAULT: {fault}", flush=True)
    by_victim = Counter(victim for record in records for victim, _ in record.kills)
    wrong = [record for record in records if record.differing or record.faults]
    print(
        f"{sum(by_victim.values())} kills {dict(by_victim)}; {len(records) - len(wrong)} of {len(records)} runs right"
    )
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
