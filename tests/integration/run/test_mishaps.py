"""Kills and corruption in the midst of a run, with standing servers: nothing finished is lost or made twice."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from base.store.checkpoint import Store
from base.store.journal import read
from flows.servers.access import client_secret
from flows.servers.start import start_prefect
from tests.integration.run.test_pipeline import PATIENCE_SECONDS, RUN, Bench, processes_of
from tests.support.processes import standing

STEPS = 120
EVALUATION = "eval/student/sort/held_out@0"


def stages_of(run: dict) -> dict[str, dict]:
    """The config of one stage of every kind, by node."""
    return {
        "base@0": run["base"]["pretrain"],
        "cold_start@0": run["cold_start"]["sft"],
        "experts/sort@0": run["experts"]["sort"]["train"]["rl"],
        "student@0": run["merge"],
    }


def progress(bench: Bench, node_id: str) -> list[dict]:
    """Progress records of a node's journal."""
    journal = bench.home / "work" / bench.key(node_id) / "journal.jsonl"
    return [record for record in read(journal) if record["kind"] == "progress"] if journal.exists() else []


def created(bench: Bench) -> dict[str, float]:
    """When each artifact was made."""
    return {artifact.key: artifact.manifest["created"] for artifact in Store(bench.home).artifacts()}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A run long enough to be killed in every stage, on a standing Prefect server and an MLflow server that is dead."""
    bench = Bench(tmp_path_factory.mktemp("mishaps"))
    run = json.loads(json.dumps(RUN)) | {"resources": {"parallel_experts": 1}}
    for config in stages_of(run).values():
        config.update(max_steps=STEPS, save_every=5)
    bench.file.write_text(yaml.safe_dump(run, sort_keys=False))
    elsewhere = bench.home.parent / "server"
    with standing(start_prefect, elsewhere, 4300) as server:
        bench.environment |= {"PREFECT_API_URL": f"{server.url}/api", **client_secret(elsewhere)}
        bench.environment |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
        yield bench


def kill_in(bench: Bench, node_id: str, steps: int) -> float:
    """Kill a run once a node has made some steps; returns when the node made its first."""
    process = bench.start()
    deadline = time.monotonic() + PATIENCE_SECONDS
    while len(progress(bench, node_id)) < steps:
        assert time.monotonic() < deadline, bench.log
        assert process.poll() is None, bench.log
        time.sleep(0.02)
    process.kill()
    process.wait()
    return float(progress(bench, node_id)[0]["time"])


def test_a_run_killed_in_every_stage_goes_on_from_its_saved_steps(bench: Bench) -> None:
    kept: dict[str, float] = {}
    first_steps: dict[str, float] = {}
    for node_id in stages_of(RUN):
        first_steps[node_id] = kill_in(bench, node_id, 12)
        assert kept.items() <= created(bench).items()
        kept = created(bench)
    kill_in(bench, EVALUATION, 1)
    done = bench.run()
    assert done.returncode == 0, done.stderr
    # The tracking server was dead all the time: a warning, no traceback, and all it missed is kept.
    assert "Traceback" not in done.stderr
    assert list((bench.home / "runs" / "tiny" / "unsent").glob("*.jsonl"))
    assert kept.items() <= created(bench).items()
    for node_id, first in first_steps.items():
        steps = progress(bench, node_id)
        assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
        assert steps[0]["time"] == first, f"{node_id} began anew"
    assert [words for words in processes_of(bench.home) if "prefect" not in " ".join(words)] == []


def test_only_what_is_corrupted_is_made_anew(bench: Bench) -> None:
    store, before = Store(bench.home), created(bench)
    keys = {name: bench.key(name) for name in ("base@0", "experts/sort@0", EVALUATION)}
    weights = store.root / keys["base@0"] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-9] ^= 0xFF
    weights.write_bytes(content)
    named = bench.run()
    assert named.returncode == 2
    assert f"{weights}: corrupted" in named.stderr
    assert "--discard-corrupted" in named.stderr
    manifest = store.root / keys["experts/sort@0"] / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    scores = store.root / keys[EVALUATION] / "scores.jsonl"
    scores.write_text(scores.read_text()[:-5])
    again = bench.run("--discard-corrupted")
    assert again.returncode == 0, again.stderr
    after = created(bench)
    assert before.keys() == after.keys()
    assert {key for key in before if before[key] != after[key]} == set(keys.values())
    assert len(list((bench.home / "corrupted").iterdir())) == len(keys)


def test_weights_made_anew_are_the_same_bit_for_bit(bench: Bench) -> None:
    store = Store(bench.home)
    base = store.get(bench.key("base@0"))
    aside = next(path for path in (bench.home / "corrupted").iterdir() if path.name.startswith(base.key))
    assert json.loads(Path(aside, "manifest.json").read_text())["digest"] == base.digest
