"""A stage over two processes makes the same update as one: gradients add up, batches are shared out."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from base.store.checkpoint import Artifact, Store
from base.store.journal import read
from stages.config.distill import DistillConfig
from stages.config.on_policy import RLConfig
from stages.config.training import OptimizerConfig, SFTConfig, StrictModel
from stages.learner.workspace import Workspace
from stages.rows.trained_on import TrainedOn
from tests.numerics.conftest import tiny_policy
from tests.support.ranks import run_script

# Partial: rewards that even a random policy reaches now and then.
OPTIONS = {"kind": "strings", "options": {"task": "uppercase", "partial": True}}
WORKER = "import sys\nfrom flows.engines.worker import main\nsys.exit(main(sys.argv[1:]))\n"
# Plain rates: AdamW's first steps turn rounding of tiny gradients into whole steps.
COMMON = {"max_steps": 2, "examples": 50, "optimizer": OptimizerConfig(learning_rate=1e-4)}
ON_POLICY = {**COMMON, "prompts_per_step": 7, "group_size": 8, "max_new_tokens": 16, "micro_batch_tokens": 256}
SFT = SFTConfig(**COMMON, batch_size=9)
STAGES: dict[str, StrictModel] = {
    "rl": RLConfig(**ON_POLICY),
    "distill": DistillConfig(
        **ON_POLICY,
        updates_per_batch=2,
        gradient_checkpointing=True,
        objective={
            "type": "sampled_reverse_kl",
            "importance": "mask",
            "outcome_weight": 0.5,
            "golden_share": 0.1,
            "reference_kl": 0.01,
        },
    ),
}


def run(home: Path, processes: int, key: str, stage: str, config: StrictModel) -> Artifact:
    """Run one node as the launcher does, but for the imports."""
    node = {
        "name": key,
        "key": key,
        "stage": stage,
        "seed": 0,
        "config": config.model_dump(mode="json"),
        "parents": {"start": "base"} | ({"teacher/upper": "teacher"} if stage == "distill" else {}),
        "domains": {"upper": OPTIONS},
        "provenance": {},
    }
    spec = home / f"{key}.json"
    spec.write_text(json.dumps({"home": str(home), "threads": 1, "nodes": [node]}))
    script = home / f"{key}.py"
    script.write_text(WORKER)
    run_script(script, [str(spec)], processes)
    return Store(home).get(key)


def same_update(home: Path, one: Artifact, other: Artifact) -> None:
    """Assert that two checkpoints moved away from the base, and to the same place."""
    base, first, second = (
        load_file(path / "model.safetensors") for path in (home / "store" / "base", one.path, other.path)
    )
    assert first.keys() == second.keys()
    moved = max(float((first[name] - base[name]).abs().max()) for name in first)
    apart = max(float((first[name] - second[name]).abs().max()) for name in first)
    assert moved > 1e-4
    assert apart < 0.05 * moved
    assert one.manifest["tokens"] == other.manifest["tokens"]
    assert one.manifest["parameters"] == other.manifest["parameters"]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two random tiny checkpoints."""
    folder = tmp_path_factory.mktemp("home")
    store = Store(folder)
    for number, key in enumerate(("base", "teacher")):
        staged = store.staging(key)
        tiny_policy(number).save(staged)
        Workspace(store, key, key, 0, {}, {}, {"stage": "test"}).commit(staged, trained_on=TrainedOn(), metrics={})
    return folder


@pytest.fixture(scope="module")
def alone(home: Path) -> Artifact:
    """What one process makes."""
    return run(home, 1, "alone", "sft", SFT)


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_make_the_update_of_one(sharding: str, home: Path, alone: Artifact) -> None:
    config = SFT.model_copy(update={"sharding": sharding, "micro_batch_tokens": 64})
    two = run(home, 2, f"sft-{sharding}", "sft", config)
    same_update(home, alone, two)
    for name in ("sft/loss", "sft/grad_norm"):
        assert alone.manifest["metrics"][name] == pytest.approx(two.manifest["metrics"][name], rel=1e-3)


@pytest.mark.parametrize("stage", STAGES)
def test_shards_make_the_update_of_whole_copies_on_the_student_s_own_samples(stage: str, home: Path) -> None:
    made = {}
    for sharding in ("none", "fsdp"):
        key = f"{stage}-{sharding}"
        made[sharding] = run(home, 2, key, stage, STAGES[stage].model_copy(update={"sharding": sharding}))
        records = [r for r in read(home / "work" / key / "journal.jsonl") if r["kind"] == "metrics"]
        assert [record["step"] for record in records] == [1, 2]
        assert all(record["values"][f"{stage}/grad_norm"] > 0 for record in records)
    same_update(home, made["none"], made["fsdp"])


# What every process of a sharded learner sees; the second start goes on from the first one's saved state.
SHARDED = """
import json, sys
from pathlib import Path
import torch
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor
import stages.learner.sharding as sharding
from stages.config.training import LoraConfig, TrainConfig
from base.store.checkpoint import Store
from stages.model.policy import load_policy
from stages.learner.supervised import cross_entropy
from stages.learner.training import Learner
from stages.learner.update import Row, accumulate, token_weights
from stages.sampling.samples import Sampling
from stages.sampling.sampler import sample

home = Path(sys.argv[1])
store, found = Store(home), {}
fully_shard, offloaded = sharding.fully_shard, []

def noted(module, **settings):
    offloaded.append(isinstance(settings["offload_policy"], CPUOffloadPolicy))
    return fully_shard(module, **settings)

sharding.fully_shard = noted
for kind, lora in {"full": None, "offloaded": None, "lora": LoraConfig(rank=4)}.items():
    policy = load_policy(store.get("base"), store, lora=lora, trainable=True)
    offload = kind == "offloaded"
    config = TrainConfig(sharding="fsdp", micro_batch_tokens=40, lora=lora, cpu_offload=offload)
    learner = Learner(policy, config, 10, home / "progress" / kind, 0)
    # The layers and the root.
    assert offloaded == [offload] * 3
    offloaded.clear()
    parameters = list(policy.model.parameters())
    assert parameters and all(isinstance(parameter, DTensor) for parameter in parameters)
    held, whole = sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)
    done, norms = learner.resume(), []
    for step in range(done, 4):
        # Completions of different lengths, prompts of different numbers: no process waits for another's tokens.
        with learner.gathered_weights():
            assert not any(isinstance(parameter, DTensor) for parameter in policy.model.parameters())
            sample(policy, [[7, 8, 9]] * (1 + learner.rank), 1, Sampling(4 + 8 * learner.rank), 0)
        assert all(isinstance(parameter, DTensor) for parameter in policy.model.parameters())
        tokens = [[7, 8, 9, *range(10, 20 + 9 * i)] for i in range(5)]
        mine = learner.shard(tokens)
        weights = token_weights([len(row) - 3 for row in mine], "token", learner)
        rows = [Row(row, 3, weight) for row, weight in zip(mine, weights, strict=True)]
        accumulate(learner, rows, lambda batch: cross_entropy(rows, batch))
        norms.append(learner.update()["grad_norm"])
        if done == 0 and step == 1:
            learner.save(2)
    final = sum(float(p.double().sum()) for p in learner.whole_parameters().values())
    found[kind] = {"held": held / whole, "done": done, "norms": norms, "final": final}
if learner.rank == 0:
    print(json.dumps(found))
"""


def test_shards_are_real_and_resume_where_they_were(home: Path, tmp_path: Path) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED)
    runs = [json.loads(run_script(script, [str(home)], 2)[0].splitlines()[-1]) for _ in range(2)]
    # On a CPU the copies of offloading change nothing.
    assert runs[0]["offloaded"] == runs[0]["full"]
    for kind in ("full", "offloaded", "lora"):
        first, second = (found[kind] for found in runs)
        assert 0.45 < first["held"] < 0.55
        assert (first["done"], second["done"]) == (0, 2)
        assert all(norm > 0 for norm in first["norms"])
        assert second["norms"] == first["norms"][2:]
        assert second["final"] == first["final"]
