"""A stage over two processes makes the same update as one: gradients add up, batches are shared out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from stages.config import OptimizerConfig, PretrainConfig, RLConfig, SFTConfig, StrictModel, TinyModelConfig
from stages.core.checkpoint import Store
from stages.core.journal import read

OPTIONS = {"kind": "strings", "options": {"task": "uppercase"}}
PRETRAIN = PretrainConfig(
    max_steps=40,
    examples=200,
    batch_tokens=512,
    model=TinyModelConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32),
)
# Plain rates: AdamW's first steps turn rounding of tiny gradients into whole steps.
SFT = SFTConfig(max_steps=2, examples=50, batch_size=9, optimizer=OptimizerConfig(learning_rate=1e-4))
RL = RLConfig(max_steps=2, examples=50, prompts_per_step=3, group_size=4, max_new_tokens=8)


def run(home: Path, processes: int, key: str, stage: str, config: StrictModel, start: str | None) -> None:
    """Run one node as the launcher does."""
    node = {
        "name": key,
        "key": key,
        "stage": stage,
        "seed": 0,
        "config": config.model_dump(mode="json"),
        "parents": {"start": start} if start else {},
        "domains": {"upper": OPTIONS},
        "provenance": {},
    }
    spec = home / f"{key}.json"
    spec.write_text(json.dumps({"home": str(home), "threads": 1, "nodes": [node]}))
    command = [sys.executable, "-m", "flows.worker", str(spec)]
    if processes > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command = [sys.executable, *launch, "-m", "flows.worker", str(spec)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    run(folder, 1, "base", "pretrain", PRETRAIN, None)
    return folder


def test_two_processes_make_the_update_of_one(home: Path) -> None:
    for processes in (1, 2):
        run(home, processes, f"sft{processes}", "sft", SFT, "base")
    one, two = (load_file(home / "store" / f"sft{n}" / "model.safetensors") for n in (1, 2))
    base = load_file(home / "store" / "base" / "model.safetensors")
    moved = max(float((one[name] - base[name]).abs().max()) for name in one)
    apart = max(float((one[name] - two[name]).abs().max()) for name in one)
    assert moved > 1e-4
    assert apart < 0.05 * moved
    manifests = [Store(home).get(f"sft{n}").manifest for n in (1, 2)]
    assert manifests[0]["tokens"] == manifests[1]["tokens"]
    assert manifests[0]["metrics"]["sft/loss"] == pytest.approx(manifests[1]["metrics"]["sft/loss"], rel=1e-3)


def test_uneven_shares_of_a_rollout_end_together(home: Path) -> None:
    run(home, 2, "rl2", "rl", RL, "base")
    records = [r for r in read(home / "work" / "rl2" / "journal.jsonl") if r["kind"] == "metrics"]
    assert [record["step"] for record in records] == [1, 2]
    assert 0 <= records[-1]["values"]["rl/reward"] <= 1
    weights = load_file(home / "store" / "rl2" / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
