"""Whole runs on real vLLM, from the command line: RL with the engine in the trainer's process, a merge with servers
that the pipeline starts for its rollouts and its teachers; and a judge behind a real server."""

import dataclasses
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

from base.store.checkpoint import Store
from base.store.journal import read
from experts.domain import Example
from experts.endpoint import NEUTRAL, Endpoint
from experts.loading import load_domain
from flows.engines.fork_client import ForkServer, child_environment
from flows.engines.vllm_commands import teacher_servers
from flows.engines.vllm_servers import VllmServers
from flows.run_file.resources import ResourcesConfig
from stages.config.distill import DistillConfig
from stages.config.training import TinyModelConfig
from stages.learner.workspace import Workspace
from stages.model.tiny import character_tokenizer, tiny_model
from stages.vllm.settings import KEY_VARIABLE
from tests.integration.run.test_pipeline import RUN
from tests.integration.vllm.conftest import AUTHORIZED
from tests.support.homes import clean_environment, with_databases

TOLERANCE = 1e-4
RUN_SECONDS = 1400
EXPERTS = ["experts/sort", "experts/reverse"]
pytestmark = pytest.mark.vllm


def on_vllm() -> dict:
    """The tiny run with heads that vLLM's attention takes on a CPU, an RL expert in process and a merge on servers."""
    run = json.loads(json.dumps(RUN))
    run["base"]["pretrain"]["model"] |= {"hidden_size": 64, "intermediate_size": 64}
    run["experts"]["sort"]["train"]["rl"]["sampler"] = {"backend": "vllm", "memory_share": 0.1}
    del run["merge"]["anchor"]
    run["merge"] |= {
        "objective": {"type": "reverse_kl", "top_k": {"k": 5}},
        "teacher_backend": "vllm_server",
        "sampler": {"backend": "vllm_server", "timeout_seconds": 600},
    }
    run["resources"] = {"parallel_experts": 1, "threads": 1}
    return run


def test_a_run_with_rl_in_process_and_a_merge_on_servers_of_its_own(tmp_path):
    file, home = tmp_path / "run.yaml", with_databases(tmp_path / "home")
    file.write_text(yaml.safe_dump(on_vllm(), sort_keys=False))
    clean = clean_environment()
    done = subprocess.run(
        [sys.executable, "-m", "flows.cli.entry", "run", "--plain", "--home", str(home), str(file)],
        env=clean,
        capture_output=True,
        text=True,
        check=False,
        timeout=RUN_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told = {}
    for folder in (home / "work").iterdir():
        records = list(read(folder / "journal.jsonl"))
        values = [record["values"] for record in records if record["kind"] == "metrics"]
        notes = [record["text"] for record in records if record["kind"] == "note"]
        told |= {stage: (values, notes) for stage in ("rl", "distill") if f"{stage}/mismatch" in (values or [{}])[-1]}
    rl, notes = told["rl"]
    assert len(rl) == 3
    merge, notes = told["distill"]
    assert len(merge) == 3 and {values["distill/staleness"] for values in merge} == {0.0}
    for values in [*rl, *merge]:
        (gap,) = [value for name, value in values.items() if name.endswith("/mismatch_max")]
        assert 0 < gap < TOLERANCE
    # One that draws, and one for each teacher, for both are full checkpoints.
    started = [line for line in done.stderr.splitlines() if "vLLM server" in line and "is started; log" in line]
    assert [line.split(" (")[1].split(")")[0] for line in started] == ["rollouts from cold_start", *EXPERTS]
    assert not any("lost: " in note for note in notes)
    left = [
        process for process in psutil.process_iter(["cmdline"]) if str(home) in " ".join(process.info["cmdline"] or ())
    ]
    assert left == []


@pytest.fixture(scope="module")
def judge_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A tiny model with room for a judge's prompt, behind a real server that samples as its folder's generation_config
    says, as `vllm serve` does: its URL and the model's name."""
    home = tmp_path_factory.mktemp("judge")
    store, tokenizer = Store(home), character_tokenizer()
    shape = TinyModelConfig(hidden_size=64, layers=1, heads=2, intermediate_size=64, max_length=4096)
    folder = store.staging("judge")
    tiny_model(shape, tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    own = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(own | {"repetition_penalty": 2.0, "do_sample": True}))
    model = Workspace(store, "judge", "judge", 0, {}, {}, {}).commit(folder, trained_on=None, metrics={})
    config = DistillConfig(objective="sampled_reverse_kl", teacher_backend="vllm_server")
    fork_server, over = ForkServer(home / "fork.log", child_environment(1), preload=()), threading.Event()
    (command,) = teacher_servers(config, [model], store, ResourcesConfig())
    arguments = list(command.arguments)
    arguments[arguments.index("--generation-config") + 1] = "auto"
    with VllmServers([dataclasses.replace(command, arguments=tuple(arguments))], home) as group:
        group.start(fork_server)
        while not group.ready():
            group.tend()
            over.wait(0.2)
        yield group.urls["teachers"][0], model.key
    fork_server.close()


def test_a_judge_on_a_real_server_marks_within_its_scale(judge_url, tmp_path, monkeypatch):
    url, model = judge_url
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"Say hello to {n}"}) + "\n" for n in range(40)))

    def judge(home: Path):
        monkeypatch.setenv("MOPD_HOME", str(home))
        options = {"path": str(tmp_path / "rows.jsonl"), "prompt_field": "q", "url": f"{url}/v1", "model": model}
        options["api_key_env"] = KEY_VARIABLE
        options |= {"rubric": "Politeness.", "scale": 7, "constrained": True, "noise_sample": 1.0}
        return load_domain("manners", "judge", options)

    def pairs(texts):
        return [(Example("Say hello", "", "manners", "Say hello"), text) for text in texts]

    texts = [f"Good morning number {n}" for n in range(12)]
    first = judge(tmp_path / "one")
    first.preflight()
    scores = first.score_all(pairs(texts))
    # A model of random weights is held to whole marks of the scale, and says the same of the same.
    assert all(score * 7 == round(score * 7) and 0 <= score <= 1 for score in scores)
    assert judge(tmp_path / "two").score_all(pairs(texts)) == scores
    facts = first.facts()
    assert facts["judged_twice"] == 12 and 0 <= facts["judge_noise"] <= 1
    # What the model has no room for gets no mark, is counted, and ends nothing.
    assert first.score_all(pairs(["x" * 5000, *texts])) == [0.0, *scores]
    assert first.facts()["judge_unmarked"] == 1


def test_a_judges_marks_do_not_depend_on_the_servers_generation_config(judge_url, tmp_path, monkeypatch):
    url, model = judge_url
    monkeypatch.setenv("MOPD_HOME", str(tmp_path / "home"))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"q": f"Say hello to {n}"}) + "\n" for n in range(40)))
    options = {"path": str(tmp_path / "rows.jsonl"), "prompt_field": "q", "url": f"{url}/v1", "model": model}
    options["api_key_env"] = KEY_VARIABLE
    options |= {"rubric": "Politeness.", "scale": 9, "constrained": True, "parallel": 1}
    domain, bodies, ask = load_domain("manners", "judge", options), [], Endpoint.request

    def noting(self, client, method, path, body=None, retries=None):
        bodies.append(body)
        return ask(self, client, method, path, body, retries)

    monkeypatch.setattr(Endpoint, "request", noting)
    texts = [f"Good morning number {n}, {'how are you ' * (n % 5)}" for n in range(30)]
    scores = domain.score_all([(Example("Say hello", "", "manners", "Say hello"), text) for text in texts])
    assert len(bodies) == 30 and domain.facts() == {}

    def asked(body):
        return httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTHORIZED, timeout=60).json()

    def marks(changes):
        replies = [asked(changes(body)) for body in bodies]
        return [int(reply["choices"][0]["message"]["content"]) / 9 for reply in replies]

    assert marks(lambda body: body | NEUTRAL) == scores
    # Left to the server they are others.
    assert marks(lambda body: {name: value for name, value in body.items() if name not in NEUTRAL}) != scores
