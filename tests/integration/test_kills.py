"""A stage killed with SIGKILL at ten random points makes the checkpoint it would have made undisturbed."""

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flows.children import Child, ForkServer, child_environment
from stages.config import DistillConfig, ObjectiveConfig, OptimizerConfig, RLConfig, StrictModel
from stages.core.checkpoint import Store
from stages.core.journal import JOURNAL_FILE, read
from stages.core.workspace import Workspace
from tests.numerics.conftest import tiny_policy
from tests.processes import ended, eventually

STEPS = 14
KILLS = 10
COMMON = {
    "max_steps": STEPS,
    "examples": 60,
    "save_every": 3,
    "updates_per_batch": 2,
    "prompts_per_step": 6,
    "max_new_tokens": 12,
    "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2),
}
STAGES: dict[str, StrictModel] = {
    "distill": DistillConfig(
        **COMMON, on_policy_fraction=0.7, objective=ObjectiveConfig(golden_share=0.1, reference_kl=0.01)
    ),
    "rl": RLConfig(**COMMON, group_size=8),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    running = ForkServer(tmp_path_factory.mktemp("server") / "log", child_environment(1))
    yield running
    running.close()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three random tiny checkpoints."""
    folder = tmp_path_factory.mktemp("home")
    store = Store(folder)
    for number, key in enumerate(("start", "sorter", "reverser")):
        staged = store.staging(key)
        tiny_policy(number).save(staged)
        Workspace(store, key, key, 0, {}, {}, {"stage": "test"}).commit(staged, sources={}, metrics={})
    return folder


def spec(home: Path, key: str, stage: str) -> Path:
    parents = {"start": "start", "teacher/sort": "sorter", "teacher/reverse": "reverser"}
    node: dict[str, Any] = {
        "name": key,
        "key": key,
        "stage": stage,
        "seed": 0,
        "config": STAGES[stage].model_dump(mode="json"),
        "parents": parents if stage == "distill" else {"start": "start"},
        "domains": {name: {"kind": "strings", "options": {"task": name}} for name in ("sort", "reverse")},
        "provenance": {},
    }
    path = home / f"{key}.json"
    path.write_text(json.dumps({"home": str(home), "threads": 1, "nodes": [node]}))
    return path


def steps_done(home: Path, key: str) -> int:
    journal = home / "work" / key / JOURNAL_FILE
    records = read(journal) if journal.exists() else ()
    return max((record["step"] for record in records if record["kind"] == "progress"), default=0)


def finish(child: Child, log: Path) -> None:
    assert child.wait(120) == 0, log.read_text()[-2000:]


@pytest.mark.parametrize("stage", STAGES)
def test_ten_kills_change_nothing(stage: str, server: ForkServer, home: Path) -> None:
    log = home / f"{stage}.log"
    finish(server.start(log, spec=spec(home, f"{stage}-whole", stage)), log)
    key, rng = f"{stage}-killed", random.Random(7)
    disturbed = spec(home, key, stage)
    # Before the first step, after random ones, and after the last, where the checkpoint is being committed.
    for target in [0, *sorted(rng.choices(range(1, STEPS), k=KILLS - 2)), STEPS]:
        child = server.start(log, spec=disturbed)
        eventually(lambda child=child: child.wait(0.01) is None and child.pid)
        eventually(lambda target=target: steps_done(home, key) >= target, within=60)
        # Somewhere in the step that follows: sampling, updating, saving.
        time.sleep(0.0 if target == STEPS else rng.uniform(0.0, 0.1))
        assert child.wait(0.01) is None, f"{stage} had ended before it could be killed: {log.read_text()[-2000:]}"
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait(10) == -signal.SIGKILL
        eventually(lambda child=child: ended(child.pid), within=5)
        assert not (home / "store" / key / "manifest.json").exists()
    finish(server.start(log, spec=disturbed), log)
    whole, killed = (Store(home).get(f"{stage}-{how}") for how in ("whole", "killed"))
    assert whole.digest != Store(home).get("start").digest
    assert killed.digest == whole.digest
    assert killed.manifest["tokens"] == whole.manifest["tokens"]
