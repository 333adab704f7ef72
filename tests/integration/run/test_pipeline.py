"""Whole runs through the command line: from nothing to a student, again from the store, stopped and resumed, failed."""

import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import pytest
import yaml

from base.store.checkpoint import Store
from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file
from tests.support.homes import clean_environment

RUN = {
    "name": "tiny",
    "base": {
        "pretrain": {
            "model": {"hidden_size": 32, "layers": 1, "heads": 2, "intermediate_size": 64, "max_length": 128},
            "max_steps": 20,
            "batch_tokens": 512,
            "examples": 200,
        }
    },
    "domains": {
        "sort": {"kind": "strings", "options": {"task": "sort", "min_length": 2, "max_length": 4, "partial": True}},
        "reverse": {"kind": "strings", "options": {"task": "reverse", "partial": True}},
        "general": {"kind": "strings", "options": {"task": "uppercase"}},
    },
    "cold_start": {"sft": {"max_steps": 4, "examples": 50, "batch_size": 16}},
    "experts": {
        "sort": {
            "domain": "sort",
            "train": {
                "rl": {"max_steps": 3, "examples": 50, "prompts_per_step": 4, "group_size": 4, "max_new_tokens": 8}
            },
        },
        "reverse": {"domain": "reverse", "train": {"sft": {"max_steps": 4, "examples": 50, "batch_size": 16}}},
    },
    "merge": {
        "max_steps": 3,
        "examples": 50,
        "prompts_per_step": 6,
        "max_new_tokens": 8,
        "anchor": {"domains": ["general"]},
    },
    "evaluate": {"examples": 8, "samples": 1, "max_new_tokens": 8},
}
LONG = "experts.sort.train.rl.max_steps=5000"
PATIENCE_SECONDS = 600


class Bench:
    """One home and run file, made once for all tests of this module."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.file = folder / "run.yaml"
        self.file.write_text(yaml.safe_dump(RUN, sort_keys=False))
        self.environment = clean_environment()

    def command(self, *overrides: str) -> list[str]:
        mopd = [sys.executable, "-m", "flows.cli.entry", "run", "--plain", "--home", str(self.home)]
        return [*mopd, str(self.file), *overrides]

    def run(self, *overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*overrides),
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=PATIENCE_SECONDS,
            check=False,
        )

    def start(self, *overrides: str) -> subprocess.Popen[str]:
        log = (self.home.parent / "started.log").open("w")
        return subprocess.Popen(
            self.command(*overrides),
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
            start_new_session=True,
        )

    @property
    def log(self) -> str:
        return (self.home.parent / "started.log").read_text()

    def wait_for_steps(self, node_id: str) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not re.search(rf"{node_id}: \d+/", self.log):
            assert time.monotonic() < deadline, self.log
            time.sleep(0.1)

    def key(self, node_id: str, *overrides: str) -> str:
        return build_graph(load_run_file(self.file, list(overrides)), self.home).node(node_id).key

    def query(self, database: str, sql: str) -> list[tuple]:
        with sqlite3.connect(self.home / database) as connection:
            return connection.execute(sql).fetchall()


def processes_of(home: Path) -> list[Sequence[str]]:
    """Processes, such as servers and nodes, that were left with this home on their command line or environment."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        try:
            words = process.info["cmdline"] or []
            if process.pid != os.getpid() and process.environ().get("PREFECT_HOME", "").startswith(str(home)):
                found.append(words)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("pipeline"))
    done = bench.run()
    assert done.returncode == 0, done.stdout + done.stderr
    yield bench


def test_a_run_makes_scores_and_records_everything(bench: Bench) -> None:
    graph = build_graph(load_run_file(bench.file), bench.home)
    store = Store(bench.home)
    assert all(store.find(node.key) for node in graph.nodes)
    tasks = dict(bench.query("prefect/prefect.db", "select name, state_name from task_run"))
    assert {node.id for node in graph.checkpoints}.issubset(tasks)
    assert set(tasks.values()) == {"Completed"}
    assert bench.query("mlflow.db", "select name, status from runs where name like 'tiny%'") == [
        ("tiny #1", "FINISHED")
    ]
    kinds = {kind for (kind,) in bench.query("prefect/prefect.db", "select type from artifact where type is not null")}
    assert {"progress", "table", "markdown"}.issubset(kinds)
    assert processes_of(bench.home) == []


def test_a_cached_run_starts_no_server_and_imports_nothing_heavy(bench: Bench) -> None:
    before = bench.query("prefect/prefect.db", "select count(*) from flow_run")
    code = (
        "import sys\nfrom pathlib import Path\nfrom flows.cli import runs as commands\n"
        f"asked = commands.RunRequest(Path({str(bench.file)!r}), (), None, Path({str(bench.home)!r}))\n"
        "code = commands.run(asked, discard_corrupted=False, plain=True, verbose=False)\n"
        "print(code, [name for name in ('prefect', 'mlflow', 'torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Everything is in the store already" in done.stdout
    assert "reverse" in done.stdout
    assert done.stdout.splitlines()[-1] == "0 []"
    assert bench.query("prefect/prefect.db", "select count(*) from flow_run") == before


def test_a_failed_expert_stops_only_what_needs_it(bench: Bench) -> None:
    overrides = ("experts.sort.train.rl.lora={target_modules: [nope]}", "experts.reverse.train.sft.max_steps=5")
    done = bench.run(*overrides)
    assert done.returncode == 2
    assert "error: experts/sort@0" in done.stderr
    assert "lora.target_modules ['nope']" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert "not started, because they depend on a failed job: student@0" in done.stderr
    store = Store(bench.home)
    assert store.find(bench.key("experts/reverse@0", *overrides)) is not None
    assert store.find(bench.key("eval/experts/reverse/reverse/held_out@0", *overrides)) is not None
    newest = "select state_name from flow_run order by created desc limit 1"
    assert bench.query("prefect/prefect.db", newest) == [("Failed",)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_so_and_leaves_nothing_behind(bench: Bench, number: signal.Signals) -> None:
    override = f"{LONG.rpartition('=')[0]}={5000 + number}"
    process = bench.start(override)
    bench.wait_for_steps("experts/sort@0")
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    assert process.wait(timeout=240) == 130
    assert f"{override} --home {bench.home}` resumes the r" in bench.log
    assert "Traceback" not in bench.log
    newest = "select state_name from flow_run order by created desc limit 1"
    assert bench.query("prefect/prefect.db", newest) == [("Cancelled",)]
    statuses = bench.query("mlflow.db", "select name, status from runs order by start_time desc limit 2")
    # The parent run has its number behind the name, and what differs.
    assert {(name.partition(" ")[0], status) for name, status in statuses} == {
        ("tiny", "KILLED"),
        ("experts/sort@0", "KILLED"),
    }
    assert processes_of(bench.home) == []


def test_a_killed_run_is_marked_and_its_node_resumes(bench: Bench) -> None:
    overrides = ("experts.sort.train.rl.max_steps=400", "experts.sort.train.rl.save_every=5")
    process = bench.start(*overrides)
    bench.wait_for_steps("experts/sort@0")
    process.kill()
    process.wait()
    done = bench.run(*overrides)
    assert done.returncode == 0, done.stderr
    states = [state for (state,) in bench.query("prefect/prefect.db", "select state_name from flow_run")]
    assert "Crashed" in states
    assert "Running" not in states
    log = (bench.home / "work" / bench.key("experts/sort@0", *overrides) / "journal.jsonl").read_text()
    assert log.count('"kind": "progress"') == 400


def test_a_corrupted_artifact_is_named_and_can_be_made_anew(bench: Bench) -> None:
    store = Store(bench.home)
    scores = store.get(bench.key("eval/student/sort/held_out@0")).path / "scores.jsonl"
    scores.write_text(scores.read_text() + "\n")
    done = bench.run()
    assert done.returncode == 2
    assert str(scores) in done.stderr
    assert "--discard-corrupted" in done.stderr
    again = bench.run("--discard-corrupted")
    assert again.returncode == 0, again.stderr
    assert "corrupted; moved to" in again.stderr
    assert list((bench.home / "corrupted").iterdir())
