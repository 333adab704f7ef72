"""A stage killed with SIGKILL at ten random points makes the checkpoint it would have made undisturbed."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from base.store.checkpoint import Store
from base.store.journal import JOURNAL_FILE, read
from flows.engines.fork_client import Child, ForkServer, child_environment
from stages.config.distill import DistillConfig
from stages.config.on_policy import RLConfig
from stages.config.training import OptimizerConfig, StrictModel
from stages.learner.workspace import Workspace
from stages.rows.trained_on import TrainedOn
from tests.numerics.conftest import tiny_policy
from tests.support.processes import ended, eventually

KILLS = 10
SAVE_EVERY = 3
# No kill but the last aims at a later step than LAST, so that one that comes late still finds the stage running.
LAST, STEPS = 12, 20
COMMON = {
    "max_steps": STEPS,
    "examples": 60,
    "save_every": SAVE_EVERY,
    "updates_per_batch": 2,
    "prompts_per_step": 6,
    "max_new_tokens": 16,
    "optimizer": OptimizerConfig(learning_rate=1e-2, schedule="cosine", warmup_steps=2),
}
STAGES: dict[str, StrictModel] = {
    "distill": DistillConfig(
        **COMMON, on_policy_fraction=0.7, objective={"type": "reverse_kl", "golden_share": 0.1, "reference_kl": 0.01}
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
        Workspace(store, key, key, 0, {}, {}, {"stage": "test"}).commit(staged, trained_on=TrainedOn(), metrics={})
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
        "domains": {
            name: {"kind": "strings", "options": {"task": name, "partial": True}} for name in ("sort", "reverse")
        },
        "provenance": {},
    }
    path = home / f"{key}.json"
    path.write_text(json.dumps({"home": str(home), "threads": 1, "nodes": [node]}))
    return path


def steps_done(work: Path) -> int:
    journal = work / JOURNAL_FILE
    records = read(journal) if journal.exists() else ()
    return max((record["step"] for record in records if record["kind"] == "progress"), default=0)


def points(rng: random.Random) -> list[tuple[int, bool, float]]:
    """Where to kill: after so many steps, whether the save behind them must have begun, and so many seconds more."""
    between = [(step, False, rng.uniform(0.0, 0.04)) for step in rng.choices(range(1, LAST), k=KILLS - 6)]
    saving = [(step, True, rng.uniform(0.0, 0.005)) for step in range(SAVE_EVERY, LAST + 1, SAVE_EVERY)]
    return [(0, False, rng.uniform(0.0, 0.3)), *sorted(between + saving)]


def arrived(work: Path, step: int, saving: bool) -> bool:
    """Whether the step is done, and the save behind it has begun where that is asked for."""
    progress = work / "progress"
    begun = (progress / f".tmp-{step}").exists() or (progress / f"step-{step}").exists()
    return steps_done(work) >= step and (begun or not saving)


def reach(condition: Callable[[], bool], child: Child) -> None:
    """Wait for a moment too short to be seen at leisure, or for the end."""
    deadline = time.monotonic() + 240
    while child.wait(0.001) is None and (child.pid is None or not condition()):
        assert time.monotonic() < deadline, "did not happen in time"


def kill(child: Child) -> bool:
    """Whether it was still running."""
    pid = child.pid
    assert pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    code = child.wait(240)
    eventually(lambda: ended(pid))
    return code == -signal.SIGKILL


def finish(child: Child, log: Path) -> None:
    assert child.wait(600) == 0, log.read_text()[-2000:]


@pytest.mark.parametrize("stage", STAGES)
def test_ten_kills_change_nothing(stage: str, server: ForkServer, home: Path) -> None:
    log = home / f"{stage}.log"
    finish(server.start(log, spec=spec(home, f"{stage}-whole", stage)), log)
    key = f"{stage}-killed"
    disturbed, store, torn = spec(home, key, stage), Store(home), 0
    staged, work = store.root / ".staging" / key, home / "work" / key
    for step, saving, delay in points(random.Random(7)):
        child = server.start(log, spec=disturbed)
        reach(partial(arrived, work, step, saving), child)
        time.sleep(delay)
        assert kill(child), f"ended before it could be killed: {log.read_text()[-2000:]}"
        torn += any((work / "progress").glob(".tmp-*"))
        assert not staged.exists()
    assert torn, "no save was cut off"
    # The last one while the checkpoint is being written; on a busy machine it may come too late to find it running.
    child = server.start(log, spec=disturbed)
    reach(staged.exists, child)
    kill(child)
    finish(server.start(log, spec=disturbed), log)
    whole, killed = (store.get(f"{stage}-{how}") for how in ("whole", "killed"))
    # A stage without a gradient would show nothing.
    records = read(home / "work" / f"{stage}-whole" / JOURNAL_FILE)
    assert sum(r["values"].get(f"{stage}/grad_norm", 0) > 0 for r in records if r["kind"] == "metrics") > STEPS / 2
    assert killed.digest == whole.digest
    assert killed.manifest["tokens"] == whole.manifest["tokens"]
