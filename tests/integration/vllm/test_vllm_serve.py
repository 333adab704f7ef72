"""`mopd serve` with real vLLM: one server of a full teacher and an adapter comes up, comes back and goes."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import yaml

from base.store.checkpoint import Store
from flows.engines.launch import Launcher
from flows.plan.graph import build_graph
from flows.run_file.load import load_run_file
from flows.run_file.resources import ResourcesConfig
from stages.model.policy import load_policy
from stages.vllm.server import VllmServer
from tests.integration.vllm.conftest import AUTHORIZED
from tests.support.processes import ended, eventually

ROOT = Path(__file__).parents[3]
START_SECONDS = 900
TOLERANCE = 1e-4
TOKENS, PROMPT = [5, 6, 7, 8, 9, 10, 11, 12, 13], 3
RUN = {
    "name": "served",
    "base": {
        "pretrain": {
            "max_steps": 2,
            "examples": 20,
            "batch_tokens": 256,
            # vLLM's attention on a CPU takes heads of 32 and more.
            "model": {"hidden_size": 64, "layers": 1, "heads": 2, "intermediate_size": 64, "max_length": 64},
        }
    },
    "domains": {name: {"kind": "strings", "options": {"task": name}} for name in ("sort", "reverse")},
    "experts": {
        "sort": {"domain": "sort", "train": {"sft": {"max_steps": 1, "examples": 8, "lora": {"rank": 4}}}},
    },
    "merge": {
        "max_steps": 2,
        "max_new_tokens": 8,
        "objective": {"type": "sampled_reverse_kl"},
        "anchor": {"domains": ["reverse"]},
    },
    "evaluate": {"examples": 4, "samples": 0, "max_new_tokens": 4},
}


@dataclass
class Serving:
    """`mopd serve teachers` at work."""

    process: subprocess.Popen[str]
    output: Path
    home: Path
    teachers: dict[str, str]

    def said(self, words: str) -> list[str]:
        return [line for line in self.output.read_text().splitlines() if words in line]

    def answered(self, times: int) -> None:
        """Wait until the server has come up so many times."""
        eventually(lambda: len(self.said(" answers")) == times or self.process.poll() is not None, START_SECONDS)
        assert self.process.poll() is None, self.output.read_text()

    @property
    def leader(self) -> psutil.Process:
        (fork_server,) = psutil.Process(self.process.pid).children()
        (api_server,) = fork_server.children()
        return api_server

    def members(self) -> list[int]:
        """API server, engine, worker and what else is below them."""
        return [process.pid for process in (self.leader, *self.leader.children(recursive=True))]


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("serve")
    file, home, output = folder / "run.yaml", folder / "home", folder / "output"
    file.write_text(yaml.safe_dump(RUN))
    graph = build_graph(load_run_file(file), home)
    with Launcher(home, ResourcesConfig()) as launcher:
        for node in ("base@0", "experts/sort@0"):
            launcher.run(graph, [graph.node(node)], lambda node, records: None)
    with output.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "flows.cli.entry", "serve", "teachers", str(file), "--home", str(home)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=out,
            stderr=out,
            text=True,
        )
    teachers = {node: graph.node(node).key for node in ("base@0", "experts/sort@0")}
    yield Serving(process, output, home, teachers)
    if process.poll() is None:
        process.terminate()
        process.wait(240)


def check_teachers(url: str, teachers: dict[str, str], home: Path) -> None:
    """Each is served under its key and scores as the local forward does."""
    request = urllib.request.Request(f"{url}/v1/models", headers=AUTHORIZED)
    with urllib.request.urlopen(request, timeout=60) as response:
        assert {entry["id"] for entry in json.loads(response.read())["data"]} == set(teachers.values())
    store, server = Store(home), VllmServer(url, 60)
    for key in teachers.values():
        policy = load_policy(store.get(key), store)
        with torch.no_grad():
            logprobs_TV = policy.model(torch.tensor([TOKENS])).logits[0].log_softmax(-1)
        told = server.score(key, TOKENS, PROMPT, 0)
        for place, token in enumerate(TOKENS[PROMPT:], start=PROMPT):
            assert told[place - PROMPT][token] == pytest.approx(float(logprobs_TV[place - 1, token]), abs=TOLERANCE)
    server.close()


@pytest.mark.vllm
@pytest.mark.timeout(2400)
def test_teachers_are_served_restarted_and_gone_after_ctrl_c(serving):
    serving.answered(1)
    eventually(lambda: serving.said("Ctrl-C ends them."))
    lines = serving.output.read_text()
    printed = yaml.safe_load(lines.split(".yaml:\n")[1].split("Ctrl-C")[0])
    (url,) = printed["resources"]["teacher_servers"]["urls"]
    assert printed["merge"] == {"teacher_backend": "vllm_server"}
    check_teachers(url, serving.teachers, serving.home)

    before = serving.members()
    assert len(before) >= 3
    os.kill(serving.leader.pid, signal.SIGKILL)
    eventually(lambda: serving.said("was killed by signal 9; it is restarted (1 of 5 times)"))
    serving.answered(2)
    assert all(ended(pid) for pid in before)
    check_teachers(url, serving.teachers, serving.home)

    members = serving.members()
    serving.process.send_signal(signal.SIGINT)
    assert serving.process.wait(240) == 0
    assert all(ended(pid) for pid in members)
    assert serving.said("ending the servers")
    assert "Traceback" not in serving.output.read_text()
