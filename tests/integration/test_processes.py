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

ROOT = Path(__file__).parents[2]
OPTIONS = {"kind": "strings", "options": {"task": "uppercase"}}
PRETRAIN = PretrainConfig(
    max_steps=40,
    examples=200,
    batch_tokens=512,
    model=TinyModelConfig(hidden_size=32, layers=1, heads=2, intermediate_size=32),
)
# Plain rates: AdamW's first steps turn rounding of tiny gradients into whole steps.
SFT = SFTConfig(max_steps=2, examples=50, batch_size=9, optimizer=OptimizerConfig(learning_rate=1e-4))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
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
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
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


def test_sharded_processes_make_the_update_of_one(home: Path) -> None:
    run(home, 1, "plain", "sft", SFT, "base")
    run(home, 2, "sharded", "sft", SFT.model_copy(update={"sharding": "fsdp", "micro_batch_tokens": 64}), "base")
    base, plain, sharded = (
        load_file(home / "store" / key / "model.safetensors") for key in ("base", "plain", "sharded")
    )
    assert plain.keys() == sharded.keys()
    moved = max(float((plain[name] - base[name]).abs().max()) for name in plain)
    apart = max(float((plain[name] - sharded[name]).abs().max()) for name in plain)
    assert moved > 1e-4
    assert apart < 0.05 * moved
    assert Store(home).get("plain").manifest["parameters"] == Store(home).get("sharded").manifest["parameters"]


# What every process of a sharded learner sees; the second start goes on from the first one's saved state.
SHARDED = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.tensor import DTensor
from stages.config import LoraConfig, TrainConfig
from stages.core.checkpoint import Store
from stages.core.policy import load_policy
from stages.core.supervised import cross_entropy
from stages.core.training import Learner
from stages.core.update import Row, accumulate, token_weights
from stages.on_policy.sampler import Sampling, sample

home, lora = Path(sys.argv[1]), LoraConfig(rank=4) if sys.argv[2] == "lora" else None
config = TrainConfig(sharding="fsdp", micro_batch_tokens=40, lora=lora)
store = Store(home)
policy = load_policy(store.get("base"), store, lora=lora, trainable=True)
learner = Learner(policy, config, 10, home / "progress" / sys.argv[2], 0)
parameters = list(policy.model.parameters())
assert parameters and all(isinstance(parameter, DTensor) for parameter in parameters)
held, whole = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
done, norms = learner.resume(), []
for step in range(done, 4):
    # Completions of different lengths, prompts of different numbers: no process waits for another's tokens.
    with learner.whole():
        sample(policy, [[7, 8, 9]] * (1 + learner.rank), 1, Sampling(4 + 8 * learner.rank), 0)
    tokens = [[7, 8, 9, *range(10, 20 + 9 * i)] for i in range(5)]
    mine = learner.shard(tokens)
    weights = token_weights([len(row) - 3 for row in mine], "token", learner)
    rows = [Row(row, 3, weight) for row, weight in zip(mine, weights, strict=True)]
    accumulate(learner, rows, lambda batch: cross_entropy(rows, batch))
    norms.append(learner.update()["grad_norm"])
    if done == 0 and step == 1:
        learner.save(2)
final = sum(float(p.double().sum()) for p in learner.whole_parameters().values())
if learner.rank == 0:
    print(json.dumps({"held": held / whole, "done": done, "norms": norms, "final": final}))
"""


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_shards_are_real_and_resume_where_they_were(kind: str, home: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    found = []
    for _ in range(2):
        done = subprocess.run(
            [*command, str(script), str(home), kind], env=ENVIRONMENT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(json.loads(done.stdout.splitlines()[-1]))
    first, second = found
    assert 0.45 < first["held"] < 0.55
    assert (first["done"], second["done"]) == (0, 2)
    assert all(norm > 0 for norm in first["norms"])
    assert second["norms"] == first["norms"][2:]
    assert second["final"] == first["final"]


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_uneven_shares_of_a_rollout_end_together(sharding: str, home: Path) -> None:
    key = f"rl-{sharding}"
    run(home, 2, key, "rl", RL.model_copy(update={"sharding": sharding}), "base")
    records = [r for r in read(home / "work" / key / "journal.jsonl") if r["kind"] == "metrics"]
    assert [record["step"] for record in records] == [1, 2]
    assert 0 <= records[-1]["values"]["rl/reward"] <= 1
    weights = load_file(home / "store" / key / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
